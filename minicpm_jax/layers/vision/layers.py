"""LayerNorm, a linear layer with bias, and attention without a mask: the parts of a tower and of a resampler.

A model's forms for a CPU and quantized forms leave these layers as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from minicpm_jax.layers.kernels.precision import precision
from weights_io.vision.config import LAYER_NORM_EPS


class LayerNorm(nnx.Module):
    """(x - mean) / deviation * weight + bias, computed in float32."""

    def __init__(self, weights: dict[str, Any]):
        self.weight, self.bias = nnx.Param(weights["weight"]), nnx.Param(weights["bias"])

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(variance + LAYER_NORM_EPS)
        return (normed * self.weight[...] + self.bias[...]).astype(x.dtype)


class BiasedLinear(nnx.Module):
    """y = W x + b, or W x."""

    def __init__(self, weights: dict[str, Any]):
        self.weight = nnx.Param(weights["weight"])
        self.bias = nnx.Param(weights["bias"]) if "bias" in weights else nnx.data(None)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return affine(x, self.weight[...], None if self.bias is None else self.bias[...])


def affine(x: Float[Array, "... I"], weight: Array, bias: Array | None = None) -> Float[Array, "... O"]:
    """W x + b in x's dtype; on a CPU the weight may be stored in fewer bits."""
    y = jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype), precision=precision(x))
    return y if bias is None else y + bias.astype(x.dtype)


def attention(
    q: Float[Array, "#B T N H"], k: Float[Array, "B S N H"], v: Float[Array, "B S N H"]
) -> Float[Array, "B T N*H"]:
    """Softmax attention of all queries over all keys, scaled by H^-0.5; the softmax is in float32."""
    q = jnp.broadcast_to(q, (len(k), *q.shape[1:]))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision=precision(q), preferred_element_type=jnp.float32)
    shares = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", shares, v, precision=precision(v)).reshape(*q.shape[:2], -1)
