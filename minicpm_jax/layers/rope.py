"""Rotary position embeddings: positions, tables of sines and cosines, rotation."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minicpm_jax.layers.kernels.precision import precision
from weights_io.config import ModelConfig


@functools.partial(jax.tree_util.register_dataclass, data_fields=["index", "cos", "sin", "segments"], meta_fields=[])
@dataclass(frozen=True)
class Positions:
    """Where the T new tokens stand and what they may see."""

    index: Int[Array, "B T"]
    cos: Float[Array, "B T H"]
    sin: Float[Array, "B T H"]
    segments: Int[Array, "B T"] | None = None  # a token sees those of its number up to itself, 0: padding; None: all

    @property
    def real(self) -> Bool[Array, "B T"] | None:
        """Which are no padding; None: all."""
        return None if self.segments is None else self.segments != 0


def positions_of(
    config: ModelConfig,
    shape: tuple[int, ...],
    mask: Int[Array, "B T"] | None = None,
    start: Int[Array, "B"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    length: Int[Array, "B #T"] | Int[Array, "B"] | None = None,
) -> Positions:
    """Positions of [B, T] new tokens: after ``start`` cached ones (``length`` in all), or of a whole batch with
    padding (``mask``) or several packed documents in a row (``segments``: numbered, 0 is padding; each sees only
    itself, and dynamic NTK takes the base of its own length)."""
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
        index = jnp.arange(width) - jnp.argmax(same, axis=2)  # since the first token of the same document
        lengths = jnp.sum(same, axis=2)
    return Positions(index, *rope_tables(config, index, lengths), mask if segments is None else segments)


def rope_tables(config: ModelConfig, index: Int[Array, "B T"], length: Int[Array, "B #T"]) -> tuple[Array, Array]:
    """cos and sin [B, T, H] in float32, half-split order (arXiv 2104.09864). Dynamic NTK scaling grows the base with
    ``length``, the number of tokens seen so far."""
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    theta = jnp.float32(config.rope_theta)
    position = index.astype(jnp.float32)
    scaling = config.rope_scaling
    if scaling is not None and scaling.type == "linear":
        position = position / scaling.factor
    if scaling is not None and scaling.type == "dynamic":
        stretch = scaling.factor * length / config.max_position_embeddings - (scaling.factor - 1)
        grown = theta * stretch ** (config.head_dim / (config.head_dim - 2))
        theta = jnp.where(length > config.max_position_embeddings, grown, theta)[..., None]
    angle = position[..., None] / theta**half
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Float[Array, "B T X H"], positions: Positions) -> Float[Array, "B T X H"]:
    """Turn each pair (h, h + H/2) by its angle, in float32, and round back to x's dtype. The halves change places by a
    product with ones, which is exact: cut out, 32 numbers of 64 would each fill 128 lanes of a TPU, a third of the
    bytes that attention moves in training."""
    head_dim = x.shape[-1]
    places = jnp.asarray(np.eye(head_dim, k=head_dim // 2) - np.eye(head_dim, k=-head_dim // 2), x.dtype)
    exact = {"precision": precision(x), "preferred_element_type": jnp.float32}
    turned = jnp.einsum("btxh,hg->btxg", x, places, **exact)  # -second, first
    return (x.astype(jnp.float32) * positions.cos[:, :, None] + turned * positions.sin[:, :, None]).astype(x.dtype)
