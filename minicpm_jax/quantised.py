"""Weights in 8 or 4 bits, for a base that is not trained: groups of numbers that share a scale."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

from minicpm_jax.adapters import linear
from weights_io.adapters import target_parameters
from weights_io.casting import check_bits, check_groups, group_of
from weights_io.config import ModelConfig
from weights_io.parameters import EMBEDDING, HEAD

if TYPE_CHECKING:
    from minicpm_jax.model import Model


class Packed(nnx.Module):
    """A weight [.., O, I] as whole numbers times the scale of their group. Read as an array is: ``weight[...]``. Kept
    turned round: with O last no group is cut into registers, and a TPU's program would turn it so on every call."""

    def __init__(self, numbers: Array, scales: Float[Array, "... G O"], dtype: Any):
        """``numbers``: [.., I, O]."""
        self.numbers, self.scales, self.dtype = nnx.Param(numbers), nnx.Param(scales), dtype

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, width, out = self.numbers.shape
        return *stack, out, width

    def __getitem__(self, index: Any) -> Array:
        numbers, scales = self.numbers[...], self.scales[...]
        *stack, groups, out = scales.shape
        wide = numbers.astype(self.dtype).reshape(*stack, groups, -1, out) * scales[..., None, :]
        return wide.reshape(numbers.shape).swapaxes(-1, -2)[index]


class Rows(nnx.Module):
    """A table of words in int8, each row with a scale: its largest number / 127. Few rows may be taken of it, and as a
    head it is read as it lies, which a scale for each of several groups in a row would not allow."""

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


def quantise_rows(weight: Float[Array, "V D"]) -> Rows:
    """Nearest numbers."""
    wide = weight.astype(jnp.float32)
    scale = (jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), 1e-30) / 127).astype(weight.dtype)
    numbers = jnp.clip(jnp.round(wide / scale.astype(jnp.float32)[:, None]), -127, 127)
    return Rows(numbers.astype(jnp.int8), scale)


def quantise(weight: Float[Array, "... O I"], bits: int, group: int) -> Packed:
    """Nearest numbers of a grid in which the largest of each ``group`` is exact: its sign takes the end that has one
    number more (-8 of -8 to 7)."""
    groups = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, group)
    place = jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True)
    lowest = -(2 ** (bits - 1))
    scales = jnp.take_along_axis(groups, place, axis=-1) / lowest
    scales = scales.astype(weight.dtype).astype(jnp.float32)
    numbers = jnp.clip(jnp.round(groups / jnp.where(scales == 0, 1, scales)), lowest, -lowest - 1)
    kind = jnp.int8 if bits == 8 else jnp.int4
    turned = numbers.reshape(weight.shape).astype(kind).swapaxes(-1, -2)
    return Packed(turned, scales[..., 0].astype(weight.dtype).swapaxes(-1, -2), weight.dtype)


def packing(config: ModelConfig, bits: int, head: bool = False) -> dict[str, Callable[[Array], Any]]:
    """How each weight that is kept in ``bits`` bits is packed, by its name in the parameter table: the matrices of the
    layers, but a router. ``head``: the head in int8, too, and with it an embedding that is the same table. For
    generation: a step reads the head whole. What they are given is used up."""
    bits, pack = check_bits(bits), jax.jit(quantise, static_argnums=(1, 2))

    def packed(name: str, width: int, weight: Array) -> Packed:
        check_groups(name, width)
        return pack(weight, bits, group_of(math.gcd(width, weight.shape[-1])))  # a mesh may have filled the rows up

    found: dict[str, Callable[[Array], Any]] = {}
    for parameter in target_parameters(config, ("all-linear",)):
        name, width = parameter.name, parameter.tensor_shape(config)[-1]
        found[name] = functools.partial(_given_up, functools.partial(packed, name, width))
    if head:
        table = EMBEDDING if config.tie_word_embeddings else HEAD
        found[table.name] = functools.partial(_given_up, jax.jit(quantise_rows))
    return found


def _given_up(pack: Callable[[Array], Any], weight: Array) -> Any:
    packed = pack(weight)
    if isinstance(weight, jax.core.Tracer):
        return packed
    jax.block_until_ready(packed)
    weight.delete()
    return packed


def quantised(model: "Model", bits: int, head: bool = False) -> "Model":
    """The model with the weights of `packing` packed; its arrays are given up."""
    model = jax.tree.map(lambda x: x, model)
    for name, pack in packing(model.config, bits, head).items():
        layer = linear(model, name)
        layer.weight = pack(layer.weight[...])
    return model


def axes_of(path: Any, axes: tuple[str, ...], ndim: int) -> tuple[str, ...]:
    """Logical axes of the leaf at ``path`` of a weight with those ``axes``, packed or not."""
    turned = {"numbers", "scales"} & set(names_of(path))
    return (*axes[:-2], axes[-1], axes[-2]) if turned else axes[:ndim]  # a head has a scale for each row


def names_of(path: Any) -> list[str]:
    """The names, or numbers, along a ``path`` of `jax.tree_util`."""
    return [str(getattr(key, "name", getattr(key, "key", key))) for key in path]
