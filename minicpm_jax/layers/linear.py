"""Linear, Embedding and RMSNorm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from minicpm_jax.layers.lora import LoRALayer
from minicpm_jax.layers.ops import Weight, linear, rows
from minicpm_jax.layers.row_lora import RowLoRALayer


class Linear(nnx.Module):
    """y = W x without bias. The weight keeps the checkpoint's [out, in] order."""

    def __init__(self, weight: Float[Array, "O I"]):
        self.weight: nnx.Param | Weight = nnx.Param(weight)
        self.adapter: LoRALayer | RowLoRALayer | None = nnx.data(None)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = linear(self.weight, x)
        return y if self.adapter is None else self.adapter(x, y)


class Embedding(nnx.Module):
    """An embedding table. `attend` computes the logits of a tied head."""

    def __init__(self, weight: Float[Array, "V D"]):
        self.weight: nnx.Param | Weight = nnx.Param(weight)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return rows(self.weight, ids)

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return linear(self.weight, x)


class RMSNorm(nnx.Module):
    """x / rms(x) is rounded to the model's dtype, then multiplied by the weight: the order of the original code."""

    def __init__(self, weight: Float[Array, "D"], eps: float):
        self.weight: nnx.Param | Weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        return self.weight.times(normed) if isinstance(self.weight, Weight) else normed * self.weight[...]
