"""Elementwise pieces that every part of the model shares, and the products with its weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from minicpm_jax.layers.kernels.precision import precision

# Rows up to which XLA:CPU multiplies twice as fast or more with the weight on the left (2 to 16 rows of 1536, 3840
# outputs; from 64 rows on a tenth slower). A TPU's program is the same either way.
FEW = 32


def gated_act(gate: Array, up: Array, threshold: float | None = None) -> Array:
    """silu(gate) * up; with a ``threshold`` FATReLU in place of SiLU: gate where gate >= threshold, else 0."""
    active = jax.nn.silu(gate) if threshold is None else jnp.where(gate >= threshold, gate, 0)
    return active * up


def scale(x: Array, factor: float) -> Array:
    """x * factor with the product in float32, rounded once to x's dtype, as PyTorch does."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def divide(x: Array, divisor: float) -> Array:
    """x / divisor, rounded likewise."""
    return (x.astype(jnp.float32) / divisor).astype(x.dtype)


class Weight(nnx.Module):
    """What stands in place of an `nnx.Param` where a weight [.., O, I] is kept, or multiplies, in a way of its own.

    ``weight[...]`` reads it as an array. A subclass overrides what it does otherwise than with that array."""

    def __getitem__(self, index: Any) -> Array:
        raise NotImplementedError

    def times(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """`linear`."""
        return linear(self[...], x)

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "... I"]:
        """`rows`."""
        return self[index]

    def of_expert(self, expert: Int[Array, ""]) -> Any:
        """`of_expert`."""
        return of_expert(self[...], expert)


def linear(weight: Any, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    """W x in x's dtype. The type of the weight chooses how: an array [O, I] (or its `nnx.Param`), or a `Weight`."""
    if isinstance(weight, Weight):
        return weight.times(x)
    weight = weight[...] if isinstance(weight, nnx.Param) else weight
    if math.prod(x.shape[:-1]) <= FEW:
        return jnp.moveaxis(jnp.einsum("oi,...i->o...", weight, x, precision=precision(x)), 0, -1)
    return jnp.einsum("...i,oi->...o", x, weight, precision=precision(x))


def rows(table: Any, index: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Of a table [V, D]."""
    return table.rows(index) if isinstance(table, Weight) else table[index]


def of_expert(weight: Any, expert: Int[Array, ""]) -> Any:
    """Of a weight [E, O, I] the [O, I] of one expert: a slice, which fuses into the product, so that no other expert's
    weights are read."""
    if isinstance(weight, Weight):
        return weight.of_expert(expert)
    weight = weight[...] if isinstance(weight, nnx.Param) else weight
    return jax.lax.dynamic_index_in_dim(weight, expert, keepdims=False)
