"""Attention over the filled part of the cache in plain XLA, block by block: used where there is no kernel."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

BLOCK = 512  # most tokens, or cache slots, of a block; half as many for one new token
TOGETHER = 256  # one new token: most lanes (heads x head dimension) of a cache slot in one part
SCORES = 1 << 19  # several new tokens: most scores of one part


class BlockCache(Protocol):
    """What is read of a `kv_cache.Cache`, or of another one with keys and values."""

    @property
    def k(self) -> Array:
        """What is stored; only its dtype is used."""

    @property
    def slots(self) -> int: ...
    @property
    def grain(self) -> int:
        """A block begins at a multiple of this many slots."""

    def heads(self, head_dim: int) -> int:
        """Key/value heads."""

    def read_block(
        self, layer: ArrayLike, row: ArrayLike, slot: ArrayLike, head: ArrayLike, like: Any
    ) -> tuple[Array, Array]: ...


def _at_once(part: Callable, given: Any) -> Array:
    return jax.vmap(part)(given)


def blockwise_attention(
    q: Float[Array, "B T N H"],
    cache: BlockCache,
    layer: ArrayLike,
    index: Int[Array, "B T"],
    each: Callable[[Callable, Any], Array] = _at_once,
    scale: float | None = None,
) -> Float[Array, "B T NH"]:
    """`attend` over the filled slots of a cache, one block at a time with a running softmax (arXiv 2205.14135): no [T,
    S] array is built. A token sees the slots up to its own, ``index``.

    The work is split into parts: one row and C of its K key/value heads each. ``each`` maps a function over the
    parts. For a single new token the query is zero in the lanes of the other heads, so keys are multiplied in their
    stored layout; a product per head, as for several tokens, transposes them. ``scale``: of the scores; None is 1 /
    sqrt(H).
    """
    batch, width, heads, head_dim = q.shape
    kv_heads, scale = cache.heads(head_dim), head_dim**-0.5 if scale is None else scale
    # Most prompts are shorter than the cache: with blocks as long as a chunk, the first chunk reads one block.
    block = min(BLOCK // 2 if width == 1 else max(width, BLOCK // 4), BLOCK, cache.slots)
    block -= block % cache.grain
    room = TOGETHER // head_dim if width == 1 else SCORES // (heads // kv_heads * width * block)
    together = max(c for c in range(1, max(1, room) + 1) if kv_heads % c == 0)
    wide, parts = width == 1, kv_heads // together
    lanes = together * head_dim if wide else head_dim
    # With float32 keys and values, one token's products stay in float32: rounding takes longer than they do.
    dtype = cache.k.dtype if wide and cache.k.dtype == jnp.float32 else q.dtype
    own = jnp.eye(together, dtype=dtype)[:, None, None, :, None]
    exact: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    lowest = jnp.finfo(jnp.float32).min

    def part(given):
        q, row, head = given
        shape = (together * q.shape[1], width)  # of the queries: heads, then tokens
        queries = (q[..., None, :] * own).reshape(1, -1, lanes) if wide else q.reshape(together, -1, lanes)

        def step(i, carry):
            top, total, mixed = carry
            first = jnp.minimum(i * block, cache.slots - block)  # the last block may overlap the one before
            # Without the barrier XLA:CPU makes a copy of the whole cache in float32 before the loop.
            held, slot = jax.lax.optimization_barrier((cache, first))
            like = jax.ShapeDtypeStruct((block, together, head_dim), dtype)
            k, v = (x.reshape(block, -1, lanes) for x in held.read_block(layer, row, slot, head, like))
            slots = first + jnp.arange(block)
            visible = (slots >= i * block) & (slots <= index[row][:, None])  # [T, S]
            if wide:  # scaled before the transpose: otherwise XLA transposes the keys instead of the scores
                scores = (jnp.einsum("sch,crh->csr", k, queries, **exact) * scale).swapaxes(1, 2)
            else:
                scores = jnp.einsum("crh,sch->crs", queries, k, **exact) * scale
            scores = jnp.where(visible, scores.reshape(*shape, block), lowest)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.where(visible, jnp.exp(scores - higher[..., None]), 0)
            fade = jnp.exp(top - higher)
            shares = weights.astype(v.dtype).reshape(*queries.shape[:2], block)
            added = jnp.einsum("crs,sch->crh", shares, v, **exact)
            mixed = mixed * fade.reshape(*queries.shape[:2], 1) + added
            return higher, total * fade + jnp.sum(weights, axis=-1), mixed

        start = jnp.full(shape, lowest), jnp.zeros(shape, jnp.float32), jnp.zeros(queries.shape, jnp.float32)
        _, total, mixed = jax.lax.fori_loop(0, (index[row, -1] + block) // block, step, start)
        mixed = mixed / total.reshape(*queries.shape[:2], 1)
        if wide:
            mixed = jnp.sum(mixed.reshape(*q.shape[:-1], together, head_dim) * own, axis=-2)
        return mixed.reshape(q.shape).astype(q.dtype)  # [C, G, T, H]

    q = q.reshape(batch, width, parts, together, -1, head_dim).transpose(0, 2, 3, 4, 1, 5)
    row, head = jnp.repeat(jnp.arange(batch), parts), jnp.tile(jnp.arange(parts) * together, batch)
    mixed = each(part, (q.reshape(batch * parts, *q.shape[2:]), row, head))
    mixed = mixed.reshape(q.shape).transpose(0, 4, 1, 2, 3, 5)
    return mixed.reshape(batch, width, heads * head_dim)


def blockwise_attention_in_turn(
    q: Float[Array, "B T N H"],
    cache: BlockCache,
    layer: ArrayLike,
    index: Int[Array, "B T"],
    scale: float | None = None,
) -> Float[Array, "B T NH"]:
    """`blockwise_attention`, one part after the other: the keys and scores of a part stay in a CPU's cache."""
    return blockwise_attention(q, cache, layer, index, jax.lax.map, scale)
