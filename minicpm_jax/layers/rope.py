"""Rotary position embeddings: positions, tables of cosines and sines, rotation."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minicpm_jax.layers.kernels.precision import precision
from weights_io.config import ModelConfig
from weights_io.rope_config import LongRoPE, RopeScaling


@functools.partial(jax.tree_util.register_dataclass, data_fields=["index", "cos", "sin", "segments"], meta_fields=[])
@dataclass(frozen=True)
class Positions:
    """Positions of the T new tokens and the tokens they may attend to."""

    index: Int[Array, "B T"]
    cos: Float[Array, "B T H"]
    sin: Float[Array, "B T H"]
    segments: Int[Array, "B T"] | None = None  # a token attends within its number; 0: padding; None: one segment

    @property
    def real(self) -> Bool[Array, "B T"] | None:
        """True for tokens, False for padding; None: no padding."""
        return None if self.segments is None else self.segments != 0


def positions_of(
    config: ModelConfig,
    shape: tuple[int, ...],
    mask: Int[Array, "B T"] | None = None,
    start: Int[Array, "B"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    length: Int[Array, "B #T"] | Int[Array, "B"] | None = None,
) -> Positions:
    """Positions of [B, T] new tokens.

    Arguments:
        shape: (B, T).
        mask: [B, T]; 0 for padding, in a batch without a cache.
        start: [B] number of cached tokens before the new ones; needs ``length``.
        segments: [B, T] numbers of the documents packed into a row; 0 is padding. A token attends only to its own
            document, and dynamic NTK and LongRoPE scale RoPE for that document's length.
        length: [B] or [B, T] length of the whole prompt or answer, for dynamic NTK and LongRoPE.
    """
    batch, width = shape
    if start is not None:
        index = start[:, None] + jnp.arange(width)
        assert length is not None
        length = length[:, None] if length.ndim == 1 else length
        return Positions(index, *rope_tables(config, index, length))
    index = jnp.broadcast_to(jnp.arange(width), (batch, width))
    lengths = jnp.full((batch, width), width)
    if mask is not None:
        index = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    if segments is not None:
        same = segments[:, :, None] == segments[:, None, :]
        index = jnp.arange(width) - jnp.argmax(same, axis=2)  # position within its document
        lengths = jnp.sum(same, axis=2)
    return Positions(index, *rope_tables(config, index, lengths), mask if segments is None else segments)


def rope_tables(config: ModelConfig, index: Int[Array, "B T"], length: Int[Array, "B #T"]) -> tuple[Array, Array]:
    """cos and sin [B, T, H] in float32, in half-split order (arXiv 2104.09864). Dynamic NTK scaling grows the base
    with ``length``, the number of tokens so far; LongRoPE chooses its factors by it."""
    half = jnp.arange(0, config.rope_dim, 2, dtype=jnp.float32) / config.rope_dim
    theta = jnp.float32(config.rope_theta)
    position = index.astype(jnp.float32)
    scaling, context = config.rope_scaling, config.max_position_embeddings
    if isinstance(scaling, RopeScaling) and scaling.type == "linear":
        position = position / scaling.factor
    if isinstance(scaling, RopeScaling) and scaling.type == "dynamic":
        stretch = scaling.factor * length / context - (scaling.factor - 1)
        grown = theta * stretch ** (config.rope_dim / (config.rope_dim - 2))
        theta = jnp.where(length > context, grown, theta)[..., None]
    freqs = theta**half  # positions per radian: [H/2] or [B, #T, H/2]
    if isinstance(scaling, LongRoPE):
        freqs = freqs * rope_factors(scaling, context, length)
    angle = position[..., None] / freqs
    angle = jnp.concatenate([angle, angle], axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    amplitude = config.rope_amplitude
    return (cos, sin) if amplitude == 1 else (cos * amplitude, sin * amplitude)


def rope_factors(scaling: LongRoPE, context: int, length: Int[Array, "B #T"]) -> Float[Array, "B #T H/2"]:
    """LongRoPE's factors."""
    long = jnp.maximum(length, context)[..., None] > scaling.original_max_position_embeddings
    return jnp.where(long, jnp.float32(scaling.long_factor), jnp.float32(scaling.short_factor))


def apply_rope(x: Float[Array, "B T X H"], positions: Positions) -> Float[Array, "B T X H"]:
    """Rotate each pair (h, h + H/2) by its angle in float32 and round to x's dtype. The halves are swapped by a
    product with a permutation matrix, which is exact. Slices of 32 of 64 lanes would each be padded to 128 lanes on
    a TPU: a third of attention's memory traffic in training."""
    head_dim = x.shape[-1]
    places = jnp.asarray(np.eye(head_dim, k=head_dim // 2) - np.eye(head_dim, k=-head_dim // 2), x.dtype)
    exact = {"precision": precision(x), "preferred_element_type": jnp.float32}
    swapped = jnp.einsum("btxh,hg->btxg", x, places, **exact)  # (-x2, x1)
    return (x.astype(jnp.float32) * positions.cos[:, :, None] + swapped * positions.sin[:, :, None]).astype(x.dtype)
