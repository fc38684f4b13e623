"""Elementwise pieces that every part of the model shares, and the precision of its products."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minicpm_jax.layers.kernels.precision import precision

# Rows up to which XLA:CPU multiplies twice as fast or more with the weight on the left (2 to 16 rows of 1536, 3840
# outputs; from 64 rows on a tenth slower). A TPU's program is the same either way.
FEW = 32


def gated(gate: Array, up: Array, threshold: float | None = None) -> Array:
    """silu(gate) * up; with a ``threshold`` FATReLU in place of SiLU: gate where gate >= threshold, else 0."""
    active = jax.nn.silu(gate) if threshold is None else jnp.where(gate >= threshold, gate, 0)
    return active * up


def scaled(x: Array, factor: float) -> Array:
    """x * factor with the product in float32, rounded once to x's dtype, as PyTorch does."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def divided(x: Array, divisor: float) -> Array:
    """x / divisor, rounded likewise."""
    return (x.astype(jnp.float32) / divisor).astype(x.dtype)


def product(weight: Float[Array, "O I"], x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    """W x in x's dtype."""
    if math.prod(x.shape[:-1]) <= FEW:
        return jnp.moveaxis(jnp.einsum("oi,...i->o...", weight, x, precision=precision(x)), 0, -1)
    return jnp.einsum("...i,oi->...o", x, weight, precision=precision(x))


def rows(table: Any, index: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Of a table [V, D]: an array, or what is read as one."""
    return table[index]
