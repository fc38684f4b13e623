"""The resampler: a fixed number of queries attends to the patches of an image, at the decoder's width.

Dims: B images or slices of one size, T patches, W width of the tower, S queries, D hidden of the decoder, N heads.

Source: resampler.py of openbmb/MiniCPM-V-2 (``adaptive``), of openbmb/MiniCPM-V and of OmniLMM-12B.
"""

import math

import mlx.core as mx
import mlx.nn as nn

from minicpm_data.images.positions import plain, sincos
from minicpm_mlx.layers.vision.layers import affine, attention
from weights_io.vision.config import LAYER_NORM_EPS, VisionConfig


class CrossAttention(nn.Module):
    """PyTorch's MultiheadAttention: one matrix [3 D, D] for queries, keys and values."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, self.heads = config.text_hidden_size, config.resampler_heads
        self.in_proj_weight, self.in_proj_bias = mx.zeros((3 * width, width)), mx.zeros(3 * width)
        self.out_proj = nn.Linear(width, width)

    def __call__(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """[B or 1, S, D] queries, [B, T, D] keys and values to [B, S, D]."""
        weights, biases = (mx.split(x, 3) for x in (self.in_proj_weight, self.in_proj_bias))
        parts = (affine(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
        return self.out_proj(attention(*(x.reshape(*x.shape[:2], self.heads, -1) for x in parts)))


class Resampler(nn.Module):
    """From the patches of an image to its tokens."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.text_hidden_size
        self.config = config
        self.query, self.pos_embed = mx.zeros((config.num_queries, width)), mx.zeros((config.num_queries, width))
        if config.hidden_size != width:
            self.kv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.attn = CrossAttention(config)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, LAYER_NORM_EPS) for _ in range(3))
        self.proj = mx.zeros((width, width))  # x @ proj, unlike a linear layer's weight

    def __call__(self, x: mx.array, grid: tuple[int, int]) -> mx.array:
        """[B, T, W] to [B, S, D]: the tokens of images whose patches lie in a ``grid`` of (rows, columns)."""
        kv = self.ln_kv(self.kv_proj(x) if "kv_proj" in self else x)
        x = self.attend(kv, self.key_positions(grid).astype(x.dtype))
        return self.ln_post(x) @ self.proj

    def attend(self, kv: mx.array, positions: mx.array) -> mx.array:
        """[B, T, D] to [B, S, D]: the attention of the queries."""
        return self.attn(self.ln_q(self.query[None]) + self.pos_embed, kv + positions, kv)

    def key_positions(self, grid: tuple[int, int]) -> mx.array:
        """The positions [T, D] of the patches: those of their own grid, or the stored table of the queries,
        interpolated."""
        rows, columns = grid
        if self.config.adaptive:
            return mx.array(sincos(rows, columns, self.config.text_hidden_size))
        table = self.pos_embed
        own, size = math.isqrt(len(table)), math.isqrt(rows * columns)
        if own == size:
            return table
        matrix, square = mx.array(plain(own, size)), table.astype(mx.float32).reshape(own, own, -1)
        resized = mx.einsum("ri,ijd,cj->rcd", matrix, square, matrix)
        return resized.reshape(size * size, -1).astype(table.dtype)
