"""The running softmax of attention over blocks of a cache, inside a kernel, with the heads of a group side by side.

Two heads of 64 share 128 lanes, and separating them would move every key. Instead a query is zero in the lanes of
the other heads: one product over W lanes gives its scores, and of weights times values only its own lanes are kept.
A matrix unit is 128 wide (v6e: 256) for any head dimension, so this costs nothing within a pair of heads. With all
heads in one group (decoding: few rows) it takes the time of loading keys and values into the unit, which any product
needs.

Dims as in cache_attention.py. Source: arXiv 2205.14135.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from minicpm_jax.layers.kernels.precision import precision
from minicpm_jax.layers.kernels.tiling import Tiling, divided


def by_group(q: Float[Array, "B T N H"], tiling: Tiling) -> Float[Array, "B groups pieces R/C W"]:
    """The queries as the kernels take them: C heads of a group side by side, G times t rows."""
    batch, width, _, head_dim = q.shape
    padded = jnp.pad(q, ((0, 0), (0, tiling.pieces * tiling.piece - width), (0, 0), (0, 0)))
    shape = batch, tiling.pieces, tiling.piece, tiling.groups, tiling.heads, tiling.heads_per_kv, head_dim
    transposed = padded.reshape(shape).transpose(0, 3, 1, 5, 2, 4, 6)  # [B, groups, pieces, G, t, C, H]
    return transposed.reshape(batch, tiling.groups, tiling.pieces, tiling.heads_per_kv * tiling.piece, tiling.lanes)


def by_token(out: Float[Array, "B groups pieces R/C W"], tiling: Tiling) -> Float[Array, "B T NH"]:
    """The inverse of `by_group`."""
    batch, groups, pieces, _, _ = out.shape
    shape = batch, groups, pieces, tiling.heads_per_kv, tiling.piece, tiling.heads, tiling.head_dim
    tokens = out.reshape(shape).transpose(0, 2, 4, 1, 5, 3, 6)  # [B, pieces, t, groups, C, G, H]
    return tokens.reshape(batch, pieces * tiling.piece, -1)[:, : tiling.width]


def _own_lanes(head: int, tiling: Tiling) -> Array:
    """The lanes [1, W] of one head of the group."""
    return divided(jax.lax.broadcasted_iota(jnp.int32, (1, tiling.lanes), 1), tiling.head_dim) == head


def begin(q_ref: Any, scratch: tuple[Any, ...], tiling: Tiling) -> None:
    """Begin the running softmax of a piece: ``scratch`` holds the queries, each zero but in the lanes of its head, the
    highest score of each, the sum of the weights and the weighted sum of the values."""
    wide, top, total, mixed = scratch
    q, span = q_ref[...].astype(jnp.float32), tiling.heads_per_kv * tiling.piece  # rows of one key/value head
    for head in range(tiling.heads):
        wide[head * span : (head + 1) * span] = jnp.where(_own_lanes(head, tiling), q, 0)
    top[...] = jnp.full(top.shape, jnp.finfo(jnp.float32).min, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    mixed[...] = jnp.zeros(mixed.shape, jnp.float32)


def accumulate(
    dtype: Any,
    k: Array,
    v: Array,
    slot: Int[Array, "1 S"],
    before: Any,
    scales: tuple[Any, Any],
    scratch: tuple[Any, ...],
    tiling: Tiling,
) -> None:
    """Add a block of keys and values [S, W] at these slots. ``before``: slots before the piece's first token."""
    wide, top, total, mixed = scratch
    q, (of_keys, of_values) = wide[...].astype(dtype), scales
    exact = precision(q)
    if of_keys is not None:
        k, v = (x.astype(jnp.float32).astype(q.dtype) for x in (k, v))
    scores = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32)
    scores = scores * tiling.head_dim**-0.5
    if of_keys is not None:
        scores = scores * of_keys
    at = before + jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (tiling.rows, 1), 0), tiling.piece)
    scores = jnp.where(slot <= at, scores, jnp.finfo(jnp.float32).min)
    # Slot 0, which every token sees, is in the first block: masked slots get weight 0 from here on.
    higher = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - higher)
    fade = jnp.exp(top[...] - higher)
    top[...] = higher
    total[...] = total[...] * fade + jnp.sum(weights, axis=1, keepdims=True)
    if of_values is not None:
        weights = weights * of_values
    mixed[...] = mixed[...] * fade + jnp.dot(
        weights.astype(v.dtype), v, precision=exact, preferred_element_type=jnp.float32
    )


def finish(out_ref: Any, scratch: tuple[Any, ...], tiling: Tiling) -> None:
    """Write the result of a piece: of each row the lanes of its own head."""
    _, _, total, mixed = scratch
    out, span = jnp.zeros(out_ref.shape, jnp.float32), tiling.heads_per_kv * tiling.piece
    for head in range(tiling.heads):
        part = slice(head * span, (head + 1) * span)
        out = out + jnp.where(_own_lanes(head, tiling), mixed[part] / total[part], 0)
    out_ref[...] = out.astype(out_ref.dtype)


def joined(parts: Sequence[Any]) -> Array:
    return parts[0][...] if len(parts) == 1 else jnp.concatenate([part[...] for part in parts])


def of_rows(scale: Float[Array, "X S"], group: ArrayLike, tiling: Tiling) -> Float[Array, "R S"]:
    """The scale of each slot for each row's head, selected by a product with ones and zeros, which is exact in
    float32."""
    span = tiling.heads_per_kv * tiling.piece
    few = span < 8  # fewer rows than a tile: repeat them in the product
    shape = (tiling.rows if few else tiling.heads, scale.shape[0])
    head = divided(jax.lax.broadcasted_iota(jnp.int32, shape, 0), span if few else 1) + group * tiling.heads
    ones = (head == jax.lax.broadcasted_iota(jnp.int32, shape, 1)).astype(jnp.float32)
    picked = jnp.dot(ones, scale, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    if few:
        return picked
    return jnp.broadcast_to(picked[:, None], (tiling.heads, span, scale.shape[1])).reshape(tiling.rows, -1)
