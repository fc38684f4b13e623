"""Matrix products in the forms that XLA:CPU computes fastest."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt16

from minicpm_jax.layers.ops import FEW, OwnProduct, Weight, expert_weight, linear, rows

FEW_WIDE = 6  # up to this many rows of float32, three products of bfloat16 are faster than widened weights
PART = 2**20  # weights widened at a time: 4 MB of float32


class CpuMatrix(OwnProduct):
    """A weight [O, I], or of experts [E, O, I], that wraps an array or a quantized weight."""

    def times(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return linear_on_cpu(self.weight[...], x)

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "... I"]:
        return rows_on_cpu(self.weight, index)

    def expert_weight(self, expert: Int[Array, ""]) -> "CpuMatrix":
        return CpuMatrix(nnx.Param(expert_weight(self.weight[...], expert)))


class Bfloat16Bits(Weight):
    """The bits of a bfloat16 weight [O, I] that multiplies in float32, for a CPU without a matrix unit.

    It takes half the memory of a float32 weight. One buffer has two views. A few rows multiply the bfloat16 view. Many
    rows need the weight in float32, a part at a time: XLA:CPU would widen a bfloat16 array as a whole, and those of all
    layers at once, but not one of uint16.
    """

    def __init__(self, weight: Float[Array, "O I"]):
        """``weight``: a bfloat16 array, whose memory is shared."""
        self.weight = nnx.Param(weight)
        self.bits = nnx.Param(jax.device_put(np.asarray(weight).view(np.uint16), next(iter(weight.devices()))))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    @property
    def dtype(self) -> Any:
        return jnp.dtype("float32")

    def __getitem__(self, index: Any) -> Array:
        return _widened(self.bits[index])

    def times(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """W x. The loop that widens has at least two turns: XLA would replace a loop of one, and widen the weights of
        all layers before it uses the first."""
        flat, bits = x.reshape(-1, x.shape[-1]), self.bits[...]
        out, width = bits.shape
        if len(flat) == 1:
            # A sum widens as it reads: nine times as fast as a product. The barrier keeps it in the loop of tokens.
            weight, row = jax.lax.optimization_barrier((self.weight[...], flat[0]))
            return jnp.sum(weight.astype(jnp.float32) * row, axis=1).reshape(*x.shape[:-1], out)
        if len(flat) <= FEW_WIDE:
            return linear_on_cpu(self.weight[...], x)
        size = max(min(PART // width, out // 2), 1)
        turns = out // size

        def product(turn: Array, y: Array) -> Array:
            part = jax.lax.dynamic_slice(bits, (turn * size, 0), (size, width))
            return jax.lax.dynamic_update_slice(y, linear(_widened(part), flat), (0, turn * size))

        y = jax.lax.fori_loop(0, turns, product, jnp.zeros((len(flat), turns * size), x.dtype))
        if rest := out - turns * size:
            y = jnp.concatenate([y, linear(_widened(bits[-rest:]), flat)], axis=1)
        return y.reshape(*x.shape[:-1], out)


def _widened(bits: UInt16[Array, "..."]) -> Float[Array, "..."]:
    """bfloat16 is the upper half of float32."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def linear_on_cpu(weight: Float[Array, "O I"], x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    """`linear`, with a bfloat16 weight in the form that XLA:CPU passes to a processor's matrix unit (AMX): float32
    accumulation and at least two rows. A single row would read the weight at 2 GB/s, two rows read it at 28.

    A float32 x is passed as the three bfloat16 numbers that sum to it, one row each: a float32 product that reads
    half as much. (Measured: closer to the exact product than float32 weights, and twice as fast for one token.)
    """
    if weight.dtype != jnp.bfloat16:
        return linear(weight, x)
    flat = x.reshape(-1, x.shape[-1])
    count = len(flat)
    if x.dtype == jnp.float32:
        parts = bfloat16_parts(flat)
    else:
        parts = [flat, flat] if count == 1 else [flat]
    rows = jnp.concatenate(parts)
    few = len(rows) <= FEW
    operands = ("oi,ri->or", weight, rows) if few else ("ri,oi->ro", rows, weight)
    y = jnp.einsum(*operands, preferred_element_type=jnp.float32)
    found = jnp.split(y, len(parts), axis=1 if few else 0)
    y = found[2] + found[1] + found[0] if x.dtype == jnp.float32 else found[0].astype(x.dtype)
    # Transposed at the end: XLA would fold an earlier transpose into the product, with the operands swapped.
    return (y.T if few else y).reshape(*x.shape[:-1], len(weight))


def bfloat16_parts(x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """Three numbers with 8-bit mantissas that sum to the 24 bits of each float32."""
    parts = []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(x, 8, 7))  # XLA may drop a conversion to bfloat16 and back
        x = x - parts[-1]
    return [part.astype(jnp.bfloat16) for part in parts]


def rows_on_cpu(table: Any, index: Int[Array, "..."]) -> Float[Array, "... D"]:
    """`rows`. XLA:CPU would copy a bfloat16 table that a loop does not change to float32 before the loop."""
    return rows(*jax.lax.optimization_barrier((table, index)))
