"""Attention of T new tokens over the filled pages of a paged cache: one Pallas TPU kernel for prompts and decoding.

Dims: L layers, B batch, T new tokens, NP pages of the pool, P slots of a page, W pages of a row's table, N query heads,
      K key/value heads, G = N / K, H head dimension. In the kernel, as in `cache_attention`: a group of heads has X
      lanes, a piece is t of the T tokens, an item is a piece of a row, a step computes on a block of n pages.

The pool stays in HBM as [L, NP, P, K H]. A row's pages may be anywhere in it; its table [W] names them in order. The
grid is (groups, steps), with as many steps as the blocks of all items: rows are of very different length, and a grid
of (items, blocks of the longest) would mostly walk steps in which nothing is computed. `work_list` names the item and
the block of each step.

Each step fetches n pages of keys and n of values, each by a block spec of its own. A page of a last block that no
token sees is not fetched: its spec names the page that it already holds, the one n places before.
"""

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, ArrayLike, Float, Int

from minicpm_jax.layers.kernels.cache_attention import Tiling, divided, joined, least, of_rows
from minicpm_jax.layers.kernels.precision import precision


PAGES = 8  # most pages of a block: each is a fetch, and an index map, of its own


class PagedCache(Protocol):
    """The arrays of a `paged_cache.PagedCache` that the kernel reads."""

    @property
    def k(self) -> Float[Array, "L NP P KH"]: ...
    @property
    def v(self) -> Float[Array, "L NP P KH"]: ...
    @property
    def k_scale(self) -> Float[Array, "L NP X P"] | None: ...
    @property
    def v_scale(self) -> Float[Array, "L NP X P"] | None: ...
    @property
    def table(self) -> Int[Array, "B W"]: ...


@dataclass(frozen=True)
class Paging:
    """How a `Tiling` of rows of W P slots goes through their pages."""

    tiling: Tiling
    page: int  # P
    pages: int  # n: of a block

    @staticmethod
    def of(tiling: Tiling, page: int) -> "Paging":
        return Paging(tiling, page, max(1, min(PAGES, tiling.block // page)))

    @property
    def width(self) -> int:
        """W."""
        return self.tiling.slots // self.page

    @property
    def block(self) -> int:
        """Slots of a block."""
        return self.pages * self.page

    @property
    def items(self) -> int:
        return self.tiling.batch * self.tiling.pieces

    def blocks(self, first: Any, piece: Any) -> Any:
        """Number of blocks that the tokens of a piece attend to."""
        return divided(self.tiling.seen(first, piece) - 1, self.block) + 1

    def item(self, step: Any, items: Any) -> tuple[Any, Any]:
        """Row and piece of a step."""
        pieces = self.tiling.pieces
        return (items[step], 0) if pieces == 1 else (divided(items[step], pieces), jax.lax.rem(items[step], pieces))

    def queries(self, group: Any, step: Any, layer: Any, first: Any, items: Any, *refs: Any) -> tuple[Any, ...]:
        """Index map of queries and output [B, groups, pieces, .., X]."""
        row, piece = self.item(step, items)
        return row, group, piece, 0, 0

    def stored(self, at: int, scale: bool, group: Any, step: Any, *refs: Any) -> tuple[Any, ...]:
        """Index map of page ``at`` of a block, in [L, NP, P, KH]; all heads at once of the ``scale``s [L, NP, X, P]."""
        layer, first, items, blocks, table = refs
        row, piece = self.item(step, items)
        entry = blocks[step] * self.pages + at
        needed = entry * self.page < self.tiling.seen(first[row], piece)
        entry = jnp.where(needed | (entry < self.pages), least(entry, self.width - 1), entry - self.pages)
        return layer[0], table[row * self.width + entry], 0, 0 if scale else group


def work_list(paging: Paging, first: Int[Array, "B"]) -> tuple[Int[Array, "Y"], Int[Array, "Y"], Int[Array, ""]]:
    """Item and block of each step, and the number of steps.

    Y is what rows of W pages would need. Comparisons and sums, without a gather: XLA for TPUs keeps them in one fusion.
    """
    tiling = paging.tiling
    entry = jnp.arange(paging.items)
    counts = paging.blocks(jnp.repeat(first, tiling.pieces), entry % tiling.pieces)
    ends = jnp.sum(jnp.where(entry[:, None] >= entry, counts, 0), axis=1)
    step = jnp.arange(paging.items * -(-paging.width // paging.pages))[:, None]
    item = jnp.sum(step >= ends, axis=1)
    block = step[:, 0] - jnp.max(jnp.where(step >= ends, ends, 0), axis=1)
    return least(item, paging.items - 1), block, ends[-1]


def _kernel(layer_ref, first_ref, item_ref, block_ref, table_ref, q_ref, *refs, paging: Paging):
    *stored, out_ref, wide, top, total, mixed = refs
    tiling, pages = paging.tiling, paging.pages
    keys, values, scales = stored[:pages], stored[pages : 2 * pages], stored[2 * pages :]
    group, step = pl.program_id(0), pl.program_id(1)
    row, piece = paging.item(step, item_ref)
    block, first = block_ref[step], first_ref[row]
    span = tiling.heads_per_kv * tiling.piece  # rows of one key/value head

    def own(head: int) -> Array:
        """The lanes [1, X] of one head of the group."""
        return divided(jax.lax.broadcasted_iota(jnp.int32, (1, tiling.lanes), 1), tiling.head_dim) == head

    @pl.when(block == 0)
    def _():
        q = q_ref[...].astype(jnp.float32)
        for head in range(tiling.heads):
            wide[head * span : (head + 1) * span] = jnp.where(own(head), q, 0)
        top[...] = jnp.full(top.shape, jnp.finfo(jnp.float32).min, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        mixed[...] = jnp.zeros(mixed.shape, jnp.float32)

    q, k, v = wide[...].astype(q_ref.dtype), joined(keys), joined(values)
    exact = precision(q)
    if scales:
        k, v = (x.astype(jnp.float32).astype(q.dtype) for x in (k, v))
    scores = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32)
    scores = scores * tiling.head_dim**-0.5
    if scales:
        scores = scores * of_rows(_beside(scales[:pages]), group, tiling)
    slot = block * paging.block + jax.lax.broadcasted_iota(jnp.int32, (1, paging.block), 1)
    token = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (tiling.rows, 1), 0), tiling.piece)
    scores = jnp.where(slot <= first + piece * tiling.piece + token, scores, jnp.finfo(jnp.float32).min)
    # Slot 0, which every token sees, is in the first block: masked slots get weight 0 from here on.
    higher = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - higher)
    fade = jnp.exp(top[...] - higher)
    top[...] = higher
    total[...] = total[...] * fade + jnp.sum(weights, axis=1, keepdims=True)
    if scales:
        weights = weights * of_rows(_beside(scales[pages:]), group, tiling)
    mixed[...] = mixed[...] * fade + jnp.dot(
        weights.astype(v.dtype), v, precision=exact, preferred_element_type=jnp.float32
    )

    @pl.when(block == paging.blocks(first, piece) - 1)
    def _():
        out = jnp.zeros(out_ref.shape, jnp.float32)
        for head in range(tiling.heads):
            part = slice(head * span, (head + 1) * span)
            out = out + jnp.where(own(head), mixed[part] / total[part], 0)
        out_ref[...] = out.astype(out_ref.dtype)


def _beside(scales: Any) -> Float[Array, "X S"]:
    """The scales of the block's pages, in the order of its slots."""
    return scales[0][...] if len(scales) == 1 else jnp.concatenate([scale[...] for scale in scales], axis=1)


@functools.partial(jax.jit, static_argnames="interpret")
def paged_attention(
    q: Float[Array, "B T N H"],
    cache: PagedCache,
    layer: ArrayLike,
    first: Int[Array, "B"],
    interpret: bool = False,
) -> Float[Array, "B T NH"]:
    """softmax(q k / sqrt(H)) v over one layer of each row's pages, which already hold the new tokens' keys and values.

    Arguments:
        q: the queries of T consecutive tokens per row.
        cache: keys and values of all layers; for int8, scores and weights are scaled instead of keys and values.
        layer: index of the layer.
        first: [B] slot of each row's first new token, counted along its table; a token attends to the slots up to its
            own.
        interpret: run the kernel without a TPU.

    Scores, softmax and sums are float32; the weights are rounded to the dtype of ``q`` before the product with the
    values.
    """
    batch, width, heads, head_dim = q.shape
    page, lanes = cache.k.shape[2:]
    slots = cache.table.shape[1] * page
    tiling = Tiling.of(batch, width, heads, head_dim, slots, lanes // head_dim, cache.k.dtype.itemsize)
    paging = Paging.of(tiling, page)
    padded = jnp.pad(q, ((0, 0), (0, tiling.pieces * tiling.piece - width), (0, 0), (0, 0)))
    shape = (batch, tiling.pieces, tiling.piece, tiling.groups, tiling.heads, tiling.heads_per_kv, head_dim)
    transposed = padded.reshape(shape).transpose(0, 3, 1, 5, 2, 4, 6)  # [B, groups, pieces, G, t, C, H]
    flat = transposed.reshape(batch, tiling.groups, tiling.pieces, tiling.heads_per_kv * tiling.piece, tiling.lanes)

    def specs(shape: tuple[int, int], scale: bool) -> list[pl.BlockSpec]:
        return [
            pl.BlockSpec((None, None, *shape), functools.partial(paging.stored, at, scale))
            for at in range(paging.pages)
        ]

    queries = pl.BlockSpec((None, None, None, *flat.shape[3:]), paging.queries)
    arrays = [cache.k] * paging.pages + [cache.v] * paging.pages
    stored = specs((page, tiling.lanes), False) * 2
    if cache.k_scale is not None and cache.v_scale is not None:
        arrays += [cache.k_scale] * paging.pages + [cache.v_scale] * paging.pages
        stored += specs((cache.k_scale.shape[2], page), True) * 2
    if not interpret:  # otherwise XLA copies a small pool into VMEM: all layers, in every layer
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
    first = first.astype(jnp.int32)
    items, blocks, steps = work_list(paging, first)
    rows = tiling.heads * flat.shape[3]
    out = pl.pallas_call(
        functools.partial(_kernel, paging=paging),
        out_shape=jax.ShapeDtypeStruct(flat.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(tiling.groups, steps),
            in_specs=[queries, *stored],
            out_specs=queries,
            scratch_shapes=[pltpu.VMEM((rows, lanes), jnp.float32) for lanes in (tiling.lanes, 1, 1, tiling.lanes)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(paging, cache, q),
        interpret=interpret,
        name="paged_attention",
    )(jnp.asarray(layer, jnp.int32).reshape(1), first, items, blocks, cache.table.reshape(-1), flat, *arrays)
    out = out.reshape(transposed.shape).transpose(0, 2, 4, 1, 5, 3, 6)  # [B, pieces, t, groups, C, G, H]
    return out.reshape(batch, -1, heads * head_dim)[:, :width]


def _cost(paging: Paging, cache: PagedCache, q: Float[Array, "B T N H"]) -> pl.CostEstimate:
    """The cost for a pool that is full of the pages of these rows: it is declared before their fill is known."""
    _, count, page, lanes = cache.k.shape
    slots = min((count - 1) * page, paging.tiling.batch * paging.tiling.slots) * paging.tiling.pieces
    held = 2 * slots * lanes * cache.k.dtype.itemsize
    held += 0 if cache.k_scale is None else 2 * slots * cache.k_scale.shape[2] * 4
    queries = q.size // (paging.tiling.batch * paging.tiling.pieces)  # numbers of one item
    return pl.CostEstimate(
        flops=4 * slots * queries,
        transcendentals=slots * queries // paging.tiling.head_dim,
        bytes_accessed=held + 2 * q.size * q.dtype.itemsize,
    )
