"""Linear, Embedding and RMSNorm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from minicpm_jax.layers.lora import LowRank
from minicpm_jax.layers.ops import product, rows


class Linear(nnx.Module):
    """y = W x, without bias. The weight keeps the [out, in] order of the checkpoint."""

    def __init__(self, weight: Float[Array, "O I"]):
        self.weight = nnx.Param(weight)
        self.adapter: LowRank | None = nnx.data(None)
        self.product = product  # `unstack` has another
        self.turned: NamedSharding | None = None  # of the weight as [I, O]; `train` says

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        weight = self.weight[...]
        if self.turned is not None:
            weight = jax.lax.with_sharding_constraint(weight.T, self.turned).T
        y = self.product(weight, x)
        return y if self.adapter is None else self.adapter(x, y, self.product)


class Embedding(nnx.Module):
    """A table of rows; a tied head is its `attend`."""

    def __init__(self, weight: Float[Array, "V D"]):
        self.weight = nnx.Param(weight)
        self.product, self.rows = product, rows  # `unstack` has others

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.rows(self.weight, ids)

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return self.product(self.weight[...], x)


class RMSNorm(nnx.Module):
    """x / rms(x), rounded to the model's dtype, then times the weight (in this order, as the original)."""

    def __init__(self, weight: Float[Array, "D"], eps: float):
        self.weight, self.eps = nnx.Param(weight), eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed, weight = (wide * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype), self.weight[...]
        if weight.ndim == 1:
            return normed * weight
        rows, tokens, width = weight.shape  # each device with its copy: `_own_norms`
        parts = normed.reshape(rows, len(x) // rows, tokens, -1, width)
        return (parts * weight[:, None, :, None]).reshape(x.shape)
