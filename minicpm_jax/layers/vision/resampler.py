"""The resampler: a fixed number of queries attends to the patches of an image, at the decoder's width.

Dims: B images or slices of one size, T patches, W width of the tower, S queries, D hidden of the decoder, N heads.

Source: resampler.py of openbmb/MiniCPM-V-2 (``adaptive``), of openbmb/MiniCPM-V and of OmniLMM-12B.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from minicpm_data.images.positions import plain, sincos
from minicpm_jax.layers.kernels.precision import precision
from minicpm_jax.layers.vision.layers import BiasedLinear, LayerNorm, affine, attention
from weights_io.vision.config import VisionConfig


class CrossAttention(nnx.Module):
    """PyTorch's MultiheadAttention: one matrix [3 D, D] for queries, keys and values."""

    def __init__(self, weights: dict[str, Any], config: VisionConfig):
        self.heads = config.resampler_heads
        self.in_proj_weight = nnx.Param(weights["in_proj_weight"])
        self.in_proj_bias = nnx.Param(weights["in_proj_bias"])
        self.out_proj = BiasedLinear(weights["out_proj"])

    def __call__(
        self, q: Float[Array, "#B S D"], k: Float[Array, "B T D"], v: Float[Array, "B T D"]
    ) -> Float[Array, "B S D"]:
        weights, biases = (jnp.split(x[...], 3) for x in (self.in_proj_weight, self.in_proj_bias))
        parts = (affine(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
        return self.out_proj(attention(*(x.reshape(*x.shape[:2], self.heads, -1) for x in parts)))


class Resampler(nnx.Module):
    """From the patches of an image to its tokens."""

    def __init__(self, weights: dict[str, Any], config: VisionConfig):
        self.config = config
        self.query, self.pos_embed = nnx.Param(weights["query"]), nnx.Param(weights["pos_embed"])
        self.kv_proj = BiasedLinear(weights["kv_proj"]) if "kv_proj" in weights else nnx.data(None)
        self.attn = CrossAttention(weights["attn"], config)
        self.ln_q, self.ln_kv, self.ln_post = (LayerNorm(weights[name]) for name in ("ln_q", "ln_kv", "ln_post"))
        self.proj = nnx.Param(weights["proj"])  # x @ proj, unlike a linear layer's weight

    def __call__(self, x: Float[Array, "B T W"], grid: tuple[int, int]) -> Float[Array, "B S D"]:
        """The tokens of images whose patches lie in a ``grid`` of (rows, columns)."""
        with jax.named_scope("resampler"):
            kv = self.ln_kv(x if self.kv_proj is None else self.kv_proj(x))
            x = self.attend(kv, self.key_positions(grid).astype(x.dtype))
            return affine(self.ln_post(x), self.proj[...].T)

    def attend(self, kv: Float[Array, "B T D"], positions: Float[Array, "T D"]) -> Float[Array, "B S D"]:
        """The attention of the queries."""
        query, own = (x[...].astype(kv.dtype) for x in (self.query, self.pos_embed))
        return self.attn(self.ln_q(query[None]) + own, kv + positions, kv)

    def key_positions(self, grid: tuple[int, int]) -> Float[Array, "T D"]:
        """The positions of the patches: those of their own grid, or the stored table of the queries, interpolated."""
        rows, columns = grid
        if self.config.adaptive:
            return jnp.asarray(sincos(rows, columns, self.config.text_hidden_size))
        table = self.pos_embed[...]
        own, size = math.isqrt(len(table)), math.isqrt(rows * columns)
        if own == size:
            return table
        matrix, square = jnp.asarray(plain(own, size)), table.astype(jnp.float32).reshape(own, own, -1)
        resized = jnp.einsum("ri,ijd,cj->rcd", matrix, square, matrix, precision=precision(square))
        return resized.reshape(size * size, -1).astype(table.dtype)
