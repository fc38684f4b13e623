"""Rotary position embeddings: positions, frequencies, rotation."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask

from weights_io.config import ModelConfig


@dataclass(frozen=True)
class Positions:
    """Where the T new tokens stand and what they may see."""

    offset: int | mx.array  # position of the first new token; [B] where rows differ, negative where padding comes first
    freqs: mx.array  # positions to a radian: [H/2], [B, H/2] where rows differ, or [B, T, H/2] where their tokens do
    tables: tuple[mx.array, mx.array] | None  # `rope_tables`; None: Metal's kernel makes them
    mask: mx.array | str | None  # [B, 1, T, S] bool, "causal", or None: a single token sees everything
    real: mx.array | None = None  # [B, T] bool: which are no padding; None: all, or it does not matter

    def last(self, width: int) -> "Positions":
        """Of the last of T new tokens alone."""
        tables = None if self.tables is None else (self.tables[0][:, :, -1:], self.tables[1][:, :, -1:])
        mask = self.mask[..., -1:, :] if isinstance(self.mask, mx.array) else None  # "causal": it sees all
        return Positions(self.offset + width - 1, self.freqs, tables, mask)


def positions_of(
    config: ModelConfig,
    ids: mx.array,
    mask: mx.array | None = None,
    cache: Any | None = None,
    segments: mx.array | None = None,
    length: int | mx.array | None = None,
) -> Positions:
    """Positions of new tokens (``ids`` [B, T], for the shape): after those in ``cache`` (any one layer's), or of a
    whole batch with padding (``mask`` [B, T]) or several packed documents in a row (``segments`` [B, T]: numbered, 0 is
    padding; each sees only itself). RoPE is relative: neither padding nor a document in a row asks for positions of its
    own. ``length``: of the whole prompt ([B] where rows differ, [B, T] where tokens do), if this is a part of it:
    dynamic NTK takes its base, and of documents that of each one's own length.
    """
    width = ids.shape[1]
    offset = 0 if cache is None else cache.offset
    same = None if segments is None else segments[:, :, None] == segments[:, None, :]
    if same is not None:
        length = same.sum(axis=2)
    freqs = rope_freqs(config, offset + width if length is None else length)
    # The kernel is for one base. On a CPU it is a graph of its own, for each layer: here once for all of them.
    kernel = freqs.ndim == 1 and mx.default_device() != mx.cpu
    tables = None if kernel else rope_tables(offset, width, freqs)
    if mask is None and segments is None:
        return Positions(offset, freqs, tables, create_attention_mask(ids, cache))
    visible = mx.tril(mx.ones((width, width), mx.bool_))[None]
    if mask is not None:
        # A padding token sees itself: softmax over nothing is NaN on some devices, and the next layer spreads it.
        visible = visible & ((mask[:, None, :] != 0) | mx.eye(width, dtype=mx.bool_))
    if same is not None:
        visible = visible & same
    return Positions(offset, freqs, tables, visible[:, None], None if segments is None else segments != 0)


def rope_freqs(config: ModelConfig, length: int | mx.array) -> mx.array:
    """theta^(2h/H) in float32, half-split order (arXiv 2104.09864): [H/2], or [..., H/2] for lengths [...]. Dynamic
    NTK scaling grows the base with ``length``, the number of tokens seen so far."""
    half = mx.arange(0, config.head_dim, 2, dtype=mx.float32) / config.head_dim
    theta = mx.array(config.rope_theta, mx.float32)
    scaling = config.rope_scaling
    if scaling is not None and scaling.type == "dynamic":
        length = mx.array(length, mx.float32)[..., None]
        stretch = scaling.factor * length / config.max_position_embeddings - (scaling.factor - 1)
        grown = theta * stretch ** (config.head_dim / (config.head_dim - 2))
        theta = mx.where(length > config.max_position_embeddings, grown, theta)
    freqs = theta**half
    if scaling is not None and scaling.type == "linear":
        freqs = freqs * scaling.factor  # as good as dividing the position
    return freqs


def rope_tables(offset: int | mx.array, width: int, freqs: mx.array) -> tuple[mx.array, mx.array]:
    """cos and sin [B, 1, T, H] in float32 of the angles; the first half of sin is negative: of (-x2, x1) times sin."""
    index = mx.array(offset)[..., None] + mx.arange(width)  # [T] or [B, T]
    angle = index[..., None] / (freqs[:, None] if freqs.ndim == 2 else freqs)
    angle = angle[None] if angle.ndim == 2 else angle
    cos, sin = mx.cos(angle), mx.sin(angle)
    return mx.concatenate([cos, cos], axis=-1)[:, None], mx.concatenate([-sin, sin], axis=-1)[:, None]


def apply_rope(x: mx.array, positions: Positions) -> mx.array:
    """Turn each pair (h, h + H/2) of x [B, N or K, T, H] by its angle, in float32, and round back to x's dtype."""
    if positions.tables is None:
        offset, freqs = positions.offset, positions.freqs
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs)
    cos, sin = positions.tables
    wide = x.astype(mx.float32)
    first, second = mx.split(wide, 2, axis=-1)
    return (wide * cos + mx.concatenate([second, first], axis=-1) * sin).astype(x.dtype)
