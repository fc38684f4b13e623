"""Elementwise operations and the linear product, shared by all layers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from minicpm_jax.layers.kernels.precision import precision

# Up to this many rows XLA:CPU is at least twice as fast with the weight as the left operand (2 to 16 rows of 1536, 3840
# outputs); from 64 rows on it is a tenth slower. The program for a TPU is the same either way.
FEW = 32


def gated_act(gate: Array, up: Array, threshold: float | None = None) -> Array:
    """SwiGLU: silu(gate) * up. With a ``threshold``, FATReLU replaces SiLU: gate if gate >= threshold, otherwise 0."""
    active = jax.nn.silu(gate) if threshold is None else jnp.where(gate >= threshold, gate, 0)
    return active * up


def scale(x: Array, factor: float) -> Array:
    """x * factor, computed in float32 and rounded once to x's dtype, as PyTorch does."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def divide(x: Array, divisor: float) -> Array:
    """x / divisor, rounded like `scale`."""
    return (x.astype(jnp.float32) / divisor).astype(x.dtype)


class Weight(nnx.Module):
    """Base class of weights [.., O, I] that are stored or multiplied differently from an `nnx.Param`.

    ``weight[...]`` reads the weight as an array with its ``shape`` and ``dtype``. A subclass overrides the methods for
    which that array is too slow.
    """

    def __getitem__(self, index: Any) -> Array:
        raise NotImplementedError

    def times(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """`linear`."""
        return linear(self[...], x)

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "... I"]:
        """`rows`."""
        return self[index]

    def expert_weight(self, expert: Int[Array, ""]) -> Any:
        """`expert_weight`."""
        return expert_weight(self[...], expert)


class OwnProduct(Weight):
    """Base class of weights that wrap another weight and multiply in their own way."""

    def __init__(self, weight: Any):
        """``weight``: an `nnx.Param`, or a `Weight`."""
        self.weight = weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def __getitem__(self, index: Any) -> Array:
        return self.weight[index]


def linear(weight: Any, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    """W x in x's dtype. The type of the weight selects the implementation: an array [O, I], an `nnx.Param` or a
    `Weight`."""
    if isinstance(weight, Weight):
        return weight.times(x)
    weight = weight[...] if isinstance(weight, nnx.Param) else weight
    if math.prod(x.shape[:-1]) <= FEW:
        return jnp.moveaxis(jnp.einsum("oi,...i->o...", weight, x, precision=precision(x)), 0, -1)
    return jnp.einsum("...i,oi->...o", x, weight, precision=precision(x))


def rows(table: Any, index: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of a table [V, D], such as an embedding."""
    return table.rows(index) if isinstance(table, Weight) else table[index]


def expert_weight(weight: Any, expert: Int[Array, ""]) -> Any:
    """The [O, I] weight of one expert of [E, O, I]. The slice fuses into the product, so no other expert's weights are
    read."""
    if isinstance(weight, Weight):
        return weight.expert_weight(expert)
    weight = weight[...] if isinstance(weight, nnx.Param) else weight
    return jax.lax.dynamic_index_in_dim(weight, expert, keepdims=False)
