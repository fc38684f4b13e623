"""Products of matrices as XLA:CPU computes them fastest."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from minicpm_jax.layers.ops import FEW, Weight, linear, of_expert, rows


class CpuMatrix(Weight):
    """A weight [O, I], or of experts [E, O, I], as an array or as what was packed."""

    def __init__(self, weight: nnx.Param | Weight):
        self.weight = weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def __getitem__(self, index: Any) -> Array:
        return self.weight[index]

    def times(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return linear_on_cpu(self.weight[...], x)

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "... I"]:
        return rows_on_cpu(self.weight, index)

    def of_expert(self, expert: Int[Array, ""]) -> "CpuMatrix":
        return CpuMatrix(nnx.Param(of_expert(self.weight[...], expert)))


def linear_on_cpu(weight: Float[Array, "O I"], x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    """`linear`, but of a weight in bfloat16 in the form in which XLA:CPU gives it to a processor's matrix unit (AMX):
    summed up in float32, and of two rows or more. One row alone would read the weight at 2 GB/s, two read it at 28.

    An x in float32 goes in as the three bfloat16 that it is the sum of, each a row: a product of float32 that reads
    half as much (measured: nearer to the exact one than that of float32 weights, and twice as fast for one token)."""
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
    # Turned at the end: a product that is turned at once XLA would write the other way round.
    return (y.T if few else y).reshape(*x.shape[:-1], len(weight))


def bfloat16_parts(x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """Three numbers of 8 bits of mantissa that add up to the 24 of each float32."""
    parts = []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(x, 8, 7))  # XLA may drop a conversion to bfloat16 and back
        x = x - parts[-1]
    return [part.astype(jnp.bfloat16) for part in parts]


def rows_on_cpu(table: Any, index: Int[Array, "..."]) -> Float[Array, "... D"]:
    """`rows`. Of a table in bfloat16 that does not change in a loop XLA:CPU would make a copy in float32 before it."""
    return rows(*jax.lax.optimization_barrier((table, index)))
