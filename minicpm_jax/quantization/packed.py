"""Quantized weights of 8 and 4 bits, and how to quantize."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int8

from minicpm_jax.layers.ops import FEW, Weight, linear

TILE = 8  # rows of a TPU's tile


class QuantizedWeight(Weight):
    """A weight [.., O, I] as integers with one scale per group of inputs; ``weight[...]`` dequantizes it.

        w = (qweight - zeros) * scales + biases

    It is stored transposed: with O last, no group is split between registers. Otherwise a TPU program would
    transpose it in every call.
    """

    def __init__(
        self,
        qweight: Int[Array, "... I O"],
        scales: Float[Array, "... G O"],
        dtype: Any,
        zeros: Int[Array, "... G O"] | None = None,
        biases: Float[Array, "... G O"] | None = None,
        order: Int[Array, "... I"] | None = None,
        group: int | None = None,
    ):
        """``dtype``: of the dequantized weight. ``order``: the inputs of the checkpoint's weight, sorted by group
        (GPTQ's act-order). ``group``: inputs per group, where the arrays of groups have more rows (`in_tiles`)."""
        self.qweight, self.scales, self.dtype = nnx.Param(qweight), nnx.Param(scales), dtype
        self.group = qweight.shape[-2] // scales.shape[-2] if group is None else group
        self.zeros, self.biases, self.order = (
            nnx.data(None) if part is None else nnx.Param(part) for part in (zeros, biases, order)
        )

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, width, out = self.qweight.shape
        return *stack, out, width

    def __getitem__(self, index: Any) -> Array:
        weight = self._sorted()
        if self.order is not None:
            weight = jnp.take_along_axis(weight, jnp.argsort(self.order[...], axis=-1)[..., None, :], axis=-1)
        return weight[index]

    def times(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return dequantized_linear(self._sorted(), x if self.order is None else jnp.take(x, self.order[...], axis=-1))

    def _sorted(self) -> Float[Array, "... O I"]:
        """The weight with its inputs sorted by group."""
        qweight = self.qweight[...]
        *stack, width, out = qweight.shape
        groups = width // self.group

        def of_groups(part: nnx.Param) -> Array:
            return part[...][..., :groups, None, :]

        wide = qweight.astype(self.dtype).reshape(*stack, groups, self.group, out)
        if self.zeros is not None:
            wide = wide - of_groups(self.zeros).astype(self.dtype)
        wide = wide * of_groups(self.scales)
        if self.biases is not None:
            wide = wide + of_groups(self.biases)
        return wide.reshape(qweight.shape).swapaxes(-1, -2)


def dequantized_linear(weight: Float[Array, "O I"], x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    """`linear` with a weight that is computed from a smaller one.

    XLA fuses what computes one operand of a product into the product. For many rows on a TPU that would be the norm
    that computes ``x``, and the dequantized weight would be written to HBM: 47.57 GB moved in a prefill chunk of
    MiniCPM4-8B in 4 bits. With a barrier, and ``x`` as a matrix, the weight is fused, in VMEM: 13.21 GB.
    """
    if math.prod(x.shape[:-1]) <= FEW:
        return linear(weight, x)
    return linear(weight, _barrier(x.reshape(-1, x.shape[-1]))).reshape(*x.shape[:-1], -1)


@jax.custom_jvp
def _barrier(x: Array) -> Array:
    """An optimization barrier, except in training, where it costs QLoRA of MiniCPM-2B a third more HBM traffic."""
    return jax.lax.optimization_barrier(x)


@_barrier.defjvp
def _without(x: tuple[Array], tangent: tuple[Array]) -> tuple[Array, Array]:
    return x[0], tangent[0]


def order_dtype(width: int) -> np.dtype:
    """The dtype of an act-order of ``width`` inputs. In 16 bits, which suffice for every released model, the orders of
    MiniCPM-2B take 1.6 MB."""
    return np.dtype(np.int16 if width <= 1 << 15 else np.int32)


def in_tiles(weight: Any) -> Any:
    """A `QuantizedWeight` for a TPU: the arrays of groups get rows of zeros up to whole tiles, which HBM pads anyway.

    For 36 groups in each of 40 layers XLA lets the layers be the rows of a tile, and copies all layers' scales in every
    step. Anything else is returned unchanged.
    """
    if not isinstance(weight, QuantizedWeight) or weight.scales.shape[-2] == 1:
        return weight

    def padded(part: nnx.Param | None) -> Array | None:
        if part is None:
            return None
        more = [(0, 0)] * (part.ndim - 2) + [(0, -part.shape[-2] % TILE), (0, 0)]
        return jnp.pad(part[...], more)

    scales, zeros, biases = (padded(part) for part in (weight.scales, weight.zeros, weight.biases))
    order = None if weight.order is None else weight.order[...]
    return QuantizedWeight(weight.qweight[...], scales, weight.dtype, zeros, biases, order, weight.group)


class QuantizedEmbedding(Weight):
    """An embedding table in int8 with one scale per row: its absolute maximum / 127. A lookup reads few rows, and as
    a head the table is multiplied in its stored layout; several scale groups per row would not allow that."""

    def __init__(self, table: Int8[Array, "V D"], scale: Float[Array, "V"]):
        self.table, self.scale = nnx.Param(table), nnx.Param(scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    def __getitem__(self, index: Any) -> Array:
        scale = self.scale[...][index][..., None]
        return self.table[...][index].astype(scale.dtype) * scale


class GroupedEmbedding(Weight):
    """An embedding table [V, D] as integers with a scale, and perhaps a bias, per group of each row: that of MLX and
    GGUF files."""

    def __init__(self, table: Int[Array, "V D"], scale: Float[Array, "V G"], bias: Float[Array, "V G"] | None = None):
        self.table, self.scale = nnx.Param(table), nnx.Param(scale)
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    def __getitem__(self, index: Any) -> Array:
        table, scale = (part[...][index] for part in (self.table, self.scale))
        wide = table.astype(scale.dtype).reshape(*scale.shape, -1) * scale[..., None]
        if self.bias is not None:
            wide = wide + self.bias[...][index][..., None]
        return wide.reshape(table.shape)


def quantize_embedding(weight: Float[Array, "V D"]) -> QuantizedEmbedding:
    """Round to the nearest integer, with one scale per row."""
    wide = weight.astype(jnp.float32)
    scale = (jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), 1e-30) / 127).astype(weight.dtype)
    qweight = jnp.clip(jnp.round(wide / scale.astype(jnp.float32)[:, None]), -127, 127)
    return QuantizedEmbedding(qweight.astype(jnp.int8), scale)


def quantize_weight(weight: Float[Array, "... O I"], bits: int, group: int) -> QuantizedWeight:
    """Round to the nearest integer. The scale of each ``group`` maps its value of largest magnitude to -8 (in 4
    bits), the end of the range that has one integer more; that value is exact."""
    groups = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, group)
    place = jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True)
    lowest = -(2 ** (bits - 1))
    scales = jnp.take_along_axis(groups, place, axis=-1) / lowest
    scales = scales.astype(weight.dtype).astype(jnp.float32)
    qweight = jnp.clip(jnp.round(groups / jnp.where(scales == 0, 1, scales)), lowest, -lowest - 1)
    kind = jnp.int8 if bits == 8 else jnp.int4
    transposed = qweight.reshape(weight.shape).astype(kind).swapaxes(-1, -2)
    return QuantizedWeight(transposed, scales[..., 0].astype(weight.dtype).swapaxes(-1, -2), weight.dtype)
