"""The weights of `quantization.packed` in a form that XLA:CPU multiplies fast: integers times integers.

Dequantizing a weight costs XLA:CPU five times as much as reading float32. So for a few rows, activations are
quantized per group to three base-128 int8 digits: the first scales the maximum to 127, the next encode the
remainder. The error is 2^-22 of the maximum, four times float32's rounding. Products of int8 are exact in int32, and
processors have an instruction for them. For many rows a layer's weight is dequantized in parts that fit into a
cache; for more than `FEW_OF_HEAD` rows the head is dequantized whole.

Dims: N digits, R rows of x, I in, O out, G groups of K inputs (I = G K), V vocabulary, D hidden.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int8

from minicpm_jax.cpu.products import linear_on_cpu, rows_on_cpu
from minicpm_jax.layers.kernels.precision import precision
from minicpm_jax.layers.ops import Weight
from minicpm_jax.quantization.packed import QuantizedEmbedding, QuantizedWeight
from minicpm_jax.quantization.table import TableWeight, lookup

FEW_OF_GROUPS = 4  # up to this many rows integer products are faster
FEW_OF_HEAD = 32  # the same for a head, which has no groups
PART = 2**20  # elements dequantized at a time: as float32 they fill a cache of 4 MB


class CpuQuantizedWeight(Weight):
    """A `QuantizedWeight` [O, I] for XLA:CPU. In 4 bits a byte holds two outputs: one of the first half in its lower
    bits, one of the second half in its upper bits."""

    def __init__(self, packed: QuantizedWeight):
        qweight = packed.qweight[...]
        if qweight.dtype == jnp.int4:
            qweight = _in_pairs(qweight) if qweight.shape[-1] % 2 == 0 else qweight.astype(jnp.int8)
        biases = packed.biases
        if packed.zeros is not None:
            biases = nnx.Param(-packed.zeros[...].astype(packed.dtype) * packed.scales[...])
        self.qweight, self.scales = nnx.Param(qweight), packed.scales
        self.biases, self.order = (nnx.data(None) if part is None else part for part in (biases, packed.order))

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, width, _ = self.qweight.shape
        return *stack, self.scales.shape[-1], width

    @property
    def dtype(self) -> Any:
        return self.scales.dtype

    def __getitem__(self, index: Any) -> Array:
        qweight, scales = self.qweight[...], self.scales[...]
        if qweight.shape[-1] != scales.shape[-1]:
            qweight = jnp.concatenate(_halves(qweight), axis=-1)
        biases, order = (None if part is None else part[...] for part in (self.biases, self.order))
        return QuantizedWeight(qweight, scales, scales.dtype, biases=biases, order=order)[index]

    def times(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """W x with float32 accumulation, in x's dtype."""
        scales = self.scales[...]
        groups, out = scales.shape
        x = x if self.order is None else jnp.take(x, self.order[...], axis=-1)
        qweight = self.qweight[...].reshape(groups, -1, self.qweight.shape[-1])
        rows = x.reshape(-1, groups, qweight.shape[1]).swapaxes(0, 1)
        few, whole = rows.shape[1] <= FEW_OF_GROUPS, qweight.shape[-1] == out
        product = functools.partial(_unpacked, _of_few if few else _of_many)
        if few and whole:
            y = product(qweight, scales, rows)
        else:  # in a loop: otherwise XLA dequantizes all weights of the model before it uses the first
            y = _part_by_part(product, qweight, scales, rows)
        if self.biases is not None:
            sums = jnp.sum(rows.astype(jnp.float32), axis=-1)  # [G, R]
            y = y + jnp.einsum("gr,go->ro", sums, self.biases[...].astype(jnp.float32), precision=precision(sums))
        return y.astype(x.dtype).reshape(*x.shape[:-1], out)


class CpuQuantizedEmbedding(QuantizedEmbedding):
    """A head [V, D] in int8 for XLA:CPU."""

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "... D"]:
        return rows_on_cpu(QuantizedEmbedding(self.table[...], self.scale[...]), index)

    def times(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits over the vocabulary, in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > FEW_OF_HEAD:
            return linear_on_cpu(self[...], x).astype(x.dtype)
        digits, units = fixed_point(rows, 4)  # four digits: one maximum serves all D elements
        sums = jnp.einsum("vd,nrd->vnr", self.table[...], digits, preferred_element_type=jnp.int32)
        y = _value([sums[:, n] for n in range(4)]) * self.scale[...].astype(jnp.float32)[:, None] * units[:, 0]
        return y.T.astype(x.dtype).reshape(*x.shape[:-1], -1)


class CpuTableWeight(Weight):
    """A `TableWeight` [O, I] for XLA:CPU, with two outputs in a byte as in `CpuQuantizedWeight`. Its values are no
    integers, so it is dequantized for few rows too, in parts that fit into a cache."""

    def __init__(self, packed: TableWeight):
        qweight = packed.qweight[...]
        qweight = _in_pairs(qweight) if qweight.shape[-1] % 2 == 0 else qweight.astype(jnp.int8)
        self.qweight, self.scales, self.table = nnx.Param(qweight), packed.scales, packed.table

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, width, _ = self.qweight.shape
        return *stack, self.scales.shape[-1], width

    @property
    def dtype(self) -> Any:
        return self.scales.dtype

    def __getitem__(self, index: Any) -> Array:
        qweight, scales = self.qweight[...], self.scales[...]
        if qweight.shape[-1] != scales.shape[-1]:
            qweight = jnp.concatenate(_halves(qweight), axis=-1)
        return TableWeight(qweight, scales, self.table[...], scales.dtype)[index]

    def times(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """W x with float32 accumulation, in x's dtype."""
        scales, table = self.scales[...], self.table[...]
        groups, out = scales.shape

        def product(qweight: Int8[Array, "G K O"], scales: Float[Array, "G O"], x: Float[Array, "G R K"]) -> Array:
            return _of_many(lookup(qweight, table), scales.astype(jnp.float32), x)

        qweight = self.qweight[...].reshape(groups, -1, self.qweight.shape[-1])
        rows = x.reshape(-1, groups, qweight.shape[1]).swapaxes(0, 1)
        y = _part_by_part(functools.partial(_unpacked, product), qweight, scales, rows)
        return y.astype(x.dtype).reshape(*x.shape[:-1], out)


def on_cpu(weight: Any) -> Any:
    """A quantized weight in the CPU form; anything else is returned unchanged."""
    if isinstance(weight, TableWeight):
        return CpuTableWeight(weight)
    if isinstance(weight, QuantizedWeight):
        return CpuQuantizedWeight(weight)
    return CpuQuantizedEmbedding(weight.table[...], weight.scale[...]) if type(weight) is QuantizedEmbedding else weight


@jax.jit
def _in_pairs(qweight: Array) -> Int8[Array, "I O/2"]:
    lower, upper = jnp.split(qweight.astype(jnp.int8), 2, axis=-1)
    return (upper << 4) | (lower & 15)


def _halves(qweight: Int8[Array, "... O/2"]) -> list[Int8[Array, "... O/2"]]:
    """Unpack bytes of two integers: the first half of the outputs, and the second."""
    return [(qweight << 4) >> 4, qweight >> 4]


def _unpacked(product: Any, qweight: Int8[Array, "G K _"], scales: Float[Array, "G O"], x: Array) -> Array:
    if qweight.shape[-1] == scales.shape[-1]:
        return product(qweight, scales, x)
    halves = zip(_halves(qweight), jnp.split(scales, 2, axis=-1), strict=True)
    return jnp.concatenate([product(*half, x) for half in halves], axis=-1)


def _part_by_part(product: Any, *operands: Array) -> Float[Array, "R O"]:
    """The sum of the products of a few groups at a time. It takes at least two parts, because one would not be a
    loop."""
    qweight, scales, x = operands
    groups = len(scales)
    most = max(min(PART // (qweight.shape[1] * scales.shape[1]), groups // 2), 1)
    part = max(count for count in range(1, most + 1) if groups % count == 0)
    parts = [array.reshape(-1, part, *array.shape[1:]) for array in operands]
    start = jnp.zeros((x.shape[1], scales.shape[1]))
    return jax.lax.scan(lambda total, some: (total + product(*some), None), start, parts)[0]


def _of_few(qweight: Int8[Array, "G K O"], scales: Float[Array, "G O"], x: Float[Array, "G R K"]) -> Array:
    digits, units = fixed_point(x, 3)
    sums = jnp.einsum("ngrk,gko->gnro", digits, qweight, preferred_element_type=jnp.int32)
    value = _value([sums[:, n] for n in range(3)]) * scales[:, None].astype(jnp.float32)
    # As a product: for XLA:CPU it is five times as fast as a sum over the groups.
    return jnp.einsum("gr,gro->ro", units[..., 0], value)


def _of_many(qweight: Int8[Array, "G K O"], scales: Float[Array, "G O"], x: Float[Array, "G R K"]) -> Array:
    weight = qweight.astype(x.dtype) * scales[:, None]
    return jnp.einsum("grk,gko->ro", x, weight, precision=precision(x), preferred_element_type=jnp.float32)


def fixed_point(x: Float[Array, "... K"], count: int) -> tuple[Int8[Array, "N ... K"], Float[Array, "... 1"]]:
    """x as ``count`` base-128 digits, most significant first, and the unit of the last digit: each group's maximum
    over 127 * 128^(count - 1)."""
    x = x.astype(jnp.float32)
    units = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-25) / (127 * 128 ** (count - 1))
    rest, digits = jnp.round(x / units).astype(jnp.int32), []
    for place in reversed(range(count)):
        digits.append((rest + (128**place >> 1)) >> 7 * place)  # nearest
        rest -= digits[-1] << 7 * place
    return jnp.stack(digits).astype(jnp.int8), units


def _value(sums: list[Array]) -> Float[Array, "..."]:
    """Combine digits, or sums of digits, into float32 values in units."""
    return functools.reduce(lambda value, digit: value * 128 + digit, [each.astype(jnp.float32) for each in sums])
