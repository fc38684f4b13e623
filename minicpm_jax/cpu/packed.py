"""What `quantization.packed` has packed, in the form that XLA:CPU multiplies fast: whole numbers times whole numbers.

To make floats of a weight costs XLA:CPU five times what it costs to read float32 ones. So a few rows of x become whole
numbers too: in each group the largest is 127 units, what is missing then is a number of units 128 times as small, and
so on. Three such digits are off by 2^-22 of the largest, four times float32's rounding of it; products of int8 are
exact in int32, and processors have an instruction for them. Many rows meet a layer's weight as floats, of which there
are never more than a cache holds; more than `FEW_OF_HEAD` rows meet a head's all at once.

Dims: N digits, R rows of x, I in, O out, G groups of K numbers of a row of the weight (I = G K), V words, D hidden.
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

FEW_OF_GROUPS = 4  # rows up to which whole numbers are the faster ones
FEW_OF_HEAD = 32  # which has no groups
PART = 2**20  # numbers that are unpacked at a time: as float32 they fill a cache of 4 MB


class CpuQuantizedWeight(Weight):
    """A `QuantizedWeight` [O, I] for XLA:CPU. In 4 bits a byte holds two outputs: one of the first half in its lower
    bits, one of the second half in its upper bits."""

    def __init__(self, packed: QuantizedWeight):
        qweight = packed.qweight[...]
        if qweight.dtype == jnp.int4:
            qweight = _in_pairs(qweight) if qweight.shape[-1] % 2 == 0 else qweight.astype(jnp.int8)
        self.qweight, self.scales = nnx.Param(qweight), packed.scales

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
        return QuantizedWeight(qweight, scales, scales.dtype)[index]

    def times(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """W x, added up in float32, in x's dtype."""
        scales = self.scales[...]
        groups, out = scales.shape
        qweight = self.qweight[...].reshape(groups, -1, self.qweight.shape[-1])
        rows = x.reshape(-1, groups, qweight.shape[1]).swapaxes(0, 1)
        few, whole = rows.shape[1] <= FEW_OF_GROUPS, qweight.shape[-1] == out
        product = functools.partial(_unpacked, _of_few if few else _of_many)
        if few and whole:
            y = product(qweight, scales, rows)
        else:  # in a loop: else XLA would unpack all weights of a model before it uses the first
            y = _part_by_part(product, qweight, scales, rows)
        return y.astype(x.dtype).reshape(*x.shape[:-1], out)


class CpuQuantizedEmbedding(QuantizedEmbedding):
    """A head [V, D] in int8."""

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "... D"]:
        return rows_on_cpu(QuantizedEmbedding(self.table[...], self.scale[...]), index)

    def times(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The words' scores, in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > FEW_OF_HEAD:
            return linear_on_cpu(self[...], x).astype(x.dtype)
        digits, units = fixed_point(rows, 4)  # four, as the largest is one of all D
        sums = jnp.einsum("vd,nrd->vnr", self.table[...], digits, preferred_element_type=jnp.int32)
        y = _value([sums[:, n] for n in range(4)]) * self.scale[...].astype(jnp.float32)[:, None] * units[:, 0]
        return y.T.astype(x.dtype).reshape(*x.shape[:-1], -1)


def on_cpu(weight: Any) -> Any:
    """What was packed in the form for a CPU; one that has it already, or has none, is given back."""
    if isinstance(weight, QuantizedWeight):
        return CpuQuantizedWeight(weight)
    return CpuQuantizedEmbedding(weight.table[...], weight.scale[...]) if type(weight) is QuantizedEmbedding else weight


@jax.jit
def _in_pairs(qweight: Array) -> Int8[Array, "I O/2"]:
    lower, upper = jnp.split(qweight.astype(jnp.int8), 2, axis=-1)
    return (upper << 4) | (lower & 15)


def _halves(qweight: Int8[Array, "... O/2"]) -> list[Int8[Array, "... O/2"]]:
    """Of bytes with two numbers each, the first half of all numbers and the second."""
    return [(qweight << 4) >> 4, qweight >> 4]


def _unpacked(product: Any, qweight: Int8[Array, "G K _"], scales: Float[Array, "G O"], x: Array) -> Array:
    if qweight.shape[-1] == scales.shape[-1]:
        return product(qweight, scales, x)
    halves = zip(_halves(qweight), jnp.split(scales, 2, axis=-1), strict=True)
    return jnp.concatenate([product(*half, x) for half in halves], axis=-1)


def _part_by_part(product: Any, *operands: Array) -> Float[Array, "R O"]:
    """The sum of the products of some groups at a time: in two parts or more, as one part would be no loop."""
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
    # As a product, which XLA:CPU makes five times as fast as a sum over the groups.
    return jnp.einsum("gr,gro->ro", units[..., 0], value)


def _of_many(qweight: Int8[Array, "G K O"], scales: Float[Array, "G O"], x: Float[Array, "G R K"]) -> Array:
    weight = qweight.astype(x.dtype) * scales[:, None]
    return jnp.einsum("grk,gko->ro", x, weight, precision=precision(x), preferred_element_type=jnp.float32)


def fixed_point(x: Float[Array, "... K"], count: int) -> tuple[Int8[Array, "N ... K"], Float[Array, "... 1"]]:
    """x as ``count`` digits in base 128 of whole numbers, the highest first, and the size of these numbers' unit: the
    largest of each K over 127 * 128^(count - 1)."""
    x = x.astype(jnp.float32)
    units = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-25) / (127 * 128 ** (count - 1))
    rest, digits = jnp.round(x / units).astype(jnp.int32), []
    for place in reversed(range(count)):
        digits.append((rest + (128**place >> 1)) >> 7 * place)  # nearest
        rest -= digits[-1] << 7 * place
    return jnp.stack(digits).astype(jnp.int8), units


def _value(sums: list[Array]) -> Float[Array, "..."]:
    """What digits, or sums of theirs, say in units."""
    return functools.reduce(lambda value, digit: value * 128 + digit, [each.astype(jnp.float32) for each in sums])
