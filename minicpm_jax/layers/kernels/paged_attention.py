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
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, ArrayLike, Float, Int

from minicpm_jax.layers.kernels.paging import Paging, beside, work_list
from minicpm_jax.layers.kernels.softmax import accumulate, begin, by_group, by_token, finish, joined, of_rows
from minicpm_jax.layers.kernels.tiling import Tiling


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


def _kernel(layer_ref, first_ref, item_ref, block_ref, table_ref, q_ref, *refs, paging: Paging):
    *stored, out_ref, wide, top, total, mixed = refs
    tiling, pages, scratch = paging.tiling, paging.pages, (wide, top, total, mixed)
    keys, values, scales = stored[:pages], stored[pages : 2 * pages], stored[2 * pages :]
    group, step = pl.program_id(0), pl.program_id(1)
    row, piece = paging.item(step, item_ref)
    block, first = block_ref[step], first_ref[row]

    @pl.when(block == 0)
    def _():
        begin(q_ref, scratch, tiling)

    given = (scales[:pages], scales[pages:]) if scales else ()
    of_keys, of_values = [of_rows(beside(each), group, tiling) for each in given] or [None, None]
    slot = block * paging.block + jax.lax.broadcasted_iota(jnp.int32, (1, paging.block), 1)
    before = first + piece * tiling.piece
    accumulate(q_ref.dtype, joined(keys), joined(values), slot, before, (of_keys, of_values), scratch, tiling)

    @pl.when(block == paging.blocks(first, piece) - 1)
    def _():
        finish(out_ref, scratch, tiling)


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
    flat = by_group(q, tiling)

    def specs(shape: tuple[int, int], whole: bool) -> list[pl.BlockSpec]:
        return [
            pl.BlockSpec((None, None, *shape), functools.partial(paging.stored, at, whole))
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
    rows, numbers = tiling.heads * flat.shape[3], q.size // (batch * tiling.pieces)
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
        cost_estimate=paging.cost(cache, 4 * numbers, numbers // head_dim, 2 * q.nbytes),
        interpret=interpret,
        name="paged_attention",
    )(jnp.asarray(layer, jnp.int32).reshape(1), first, items, blocks, cache.table.reshape(-1), flat, *arrays)
    return by_token(out, tiling)
