"""Rotary position embeddings: positions, frequencies, rotation."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask

from weights_io.config import ModelConfig
from weights_io.rope_config import LongRoPE, RopeScaling


@dataclass(frozen=True)
class Positions:
    """Positions of the T new tokens and the tokens they may attend to."""

    offset: int | mx.array  # position of the first new token; [B] if rows differ, negative if padding comes first
    freqs: mx.array  # positions per radian: [H/2], [B, H/2] if rows differ, [B, T, H/2] if tokens do
    tables: tuple[mx.array, mx.array] | None  # `rope_tables`; None: Metal's kernel computes them
    mask: mx.array | str | None  # [B, 1, T, S] bool, "causal", or None: a single token sees everything
    real: mx.array | None = None  # [B, T] bool: False for padding; None: all real, or unused

    def last(self, width: int) -> "Positions":
        """The position of the last of T new tokens."""
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
    """Positions of new tokens. RoPE is relative, so neither padding nor a later document of a row needs positions of
    its own.

    Arguments:
        ids: [B, T]; only the shape is used.
        mask: [B, T]; 0 for padding, in a batch without a cache.
        cache: any one layer's cache; the new tokens follow its tokens.
        segments: [B, T] numbers of the documents packed into a row; 0 is padding. A token attends only to its own
            document, and dynamic NTK and LongRoPE scale RoPE for that document's length.
        length: length of the whole prompt ([B] if rows differ, [B, T] if tokens do), for dynamic NTK and LongRoPE, if
            these tokens are one chunk of it.
    """
    width = ids.shape[1]
    offset = 0 if cache is None else cache.offset
    same = None if segments is None else segments[:, :, None] == segments[:, None, :]
    if same is not None:
        length = same.sum(axis=2)
    freqs = rope_freqs(config, offset + width if length is None else length)
    # The kernel takes one base for all rows and no amplitude. On a CPU it would add a graph per layer; the tables are
    # shared by layers.
    kernel = freqs.ndim == 1 and config.rope_amplitude == 1 and mx.default_device() != mx.cpu
    tables = None if kernel else rope_tables(offset, width, freqs, config.rope_amplitude)
    if mask is None and segments is None:
        return Positions(offset, freqs, tables, create_attention_mask(ids, cache))
    visible = mx.tril(mx.ones((width, width), mx.bool_))[None]
    if mask is not None:
        # A padding token attends to itself: an empty softmax is NaN on some devices, and spreads in the next layer.
        visible = visible & ((mask[:, None, :] != 0) | mx.eye(width, dtype=mx.bool_))
    if same is not None:
        visible = visible & same
    return Positions(offset, freqs, tables, visible[:, None], None if segments is None else segments != 0)


def rope_freqs(config: ModelConfig, length: int | mx.array) -> mx.array:
    """theta^(2h/H) in float32, in half-split order (arXiv 2104.09864): [H/2], or [..., H/2] for lengths [...].
    Dynamic NTK scaling grows the base with ``length``, the number of tokens so far; LongRoPE chooses its factors by
    it."""
    half = mx.arange(0, config.rope_dim, 2, dtype=mx.float32) / config.rope_dim
    theta = mx.array(config.rope_theta, mx.float32)
    scaling, context = config.rope_scaling, config.max_position_embeddings
    if isinstance(scaling, RopeScaling) and scaling.type == "dynamic":
        length = mx.array(length, mx.float32)[..., None]
        stretch = scaling.factor * length / context - (scaling.factor - 1)
        grown = theta * stretch ** (config.rope_dim / (config.rope_dim - 2))
        theta = mx.where(length > context, grown, theta)
    freqs = theta**half
    if isinstance(scaling, RopeScaling) and scaling.type == "linear":
        freqs = freqs * scaling.factor  # the same as dividing the position
    if isinstance(scaling, LongRoPE):
        freqs = freqs * rope_factors(scaling, context, length)
    return freqs


def rope_factors(scaling: LongRoPE, context: int, length: int | mx.array) -> mx.array:
    """LongRoPE's factors: [H/2], or [..., H/2] for lengths [...]."""
    if isinstance(length, int):
        beyond = max(length, context) > scaling.original_max_position_embeddings
        return mx.array(scaling.long_factor if beyond else scaling.short_factor)
    long = mx.maximum(length, context)[..., None] > scaling.original_max_position_embeddings
    return mx.where(long, mx.array(scaling.long_factor), mx.array(scaling.short_factor))


def rope_tables(offset: int | mx.array, width: int, freqs: mx.array, amplitude: float) -> tuple[mx.array, mx.array]:
    """cos and sin [B, 1, T, H] of the angles in float32, times ``amplitude``. The first half of sin is negated: it
    multiplies (x2, x1)."""
    index = mx.array(offset)[..., None] + mx.arange(width)  # [T] or [B, T]
    angle = index[..., None] / (freqs[:, None] if freqs.ndim == 2 else freqs)
    angle = angle[None] if angle.ndim == 2 else angle
    cos, sin = mx.cos(angle), mx.sin(angle)
    if amplitude != 1:
        cos, sin = cos * amplitude, sin * amplitude
    return mx.concatenate([cos, cos], axis=-1)[:, None], mx.concatenate([-sin, sin], axis=-1)[:, None]


def apply_rope(x: mx.array, positions: Positions) -> mx.array:
    """Rotate each pair (h, h + H/2) of x [B, N or K, T, H] by its angle in float32 and round to x's dtype."""
    if positions.tables is None:
        offset, freqs = positions.offset, positions.freqs
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs)
    cos, sin = positions.tables
    wide = x.astype(mx.float32)
    first, second = mx.split(wide, 2, axis=-1)
    return (wide * cos + mx.concatenate([second, first], axis=-1) * sin).astype(x.dtype)
