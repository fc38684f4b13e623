"""`latent_attention` and `latent_prefill` over the pages of a paged latent cache.

Dims as there; NP pages of the pool, Q entries of a page, W pages of a row's table. The grid is (1, steps) for a few
tokens and (heads, steps) for a chunk of a prompt; `paging.work_list` names the row and the block of each step.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, ArrayLike, Float, Int

from minicpm_jax.layers.kernels import latent_attention as few
from minicpm_jax.layers.kernels import latent_prefill as many
from minicpm_jax.layers.kernels.latent_attention import TOKENS, tiling_of
from minicpm_jax.layers.kernels.paging import Paging, beside, work_list
from minicpm_jax.layers.kernels.softmax import joined


class PagedLatents(Protocol):
    """The arrays of a `paged_cache.PagedLatentCache` that the kernels read."""

    @property
    def k(self) -> Float[Array, "L NP Q 4C+4R"]: ...
    @property
    def k_scale(self) -> Float[Array, "L NP 8 Q"] | None: ...
    @property
    def table(self) -> Int[Array, "B W"]: ...


def _few_kernel(
    layer_ref, first_ref, item_ref, block_ref, table_ref, q_ref, *refs, paging: Paging, rank: int, factor: float
):
    *stored, out_ref, wide, top, total, mixed = refs
    pages, step, scratch = paging.pages, pl.program_id(1), (wide, top, total, mixed)
    row, block = item_ref[step], block_ref[step]

    @pl.when(block == 0)
    def _():
        few.begin(q_ref, scratch, rank)

    entry = block * paging.block + jax.lax.broadcasted_iota(jnp.int32, (1, paging.block), 1)
    scale = beside(stored[pages:]) if stored[pages:] else None
    held = q_ref[:, :rank], joined(stored[:pages]), scale
    few.accumulate(*held, entry, first_ref[row], scratch, paging.tiling.width, factor)

    @pl.when(block == paging.blocks(first_ref[row], 0) - 1)
    def _():
        out_ref[...] = (mixed[...] / total[...]).astype(out_ref.dtype)


def _many_kernel(
    layer_ref,
    first_ref,
    item_ref,
    block_ref,
    table_ref,
    q_ref,
    weight_ref,
    *refs,
    paging: Paging,
    sizes: tuple[int, int],
    factor: float,
):
    *stored, out_ref, queries, top, total, mixed = refs
    pages, step, scratch = paging.pages, pl.program_id(1), (queries, top, total, mixed)
    row, piece = paging.item(step, item_ref)
    block, first = block_ref[step], first_ref[row]

    @pl.when(block == 0)
    def _():
        many.begin(q_ref, scratch, sizes)

    entry = block * paging.block + jax.lax.broadcasted_iota(jnp.int32, (1, paging.block), 1)
    scale = beside(stored[pages:]) if stored[pages:] else None
    given = joined(stored[:pages]), scale, weight_ref[...], entry, first + piece * paging.tiling.piece
    many.accumulate(q_ref.dtype, *given, scratch, factor)

    @pl.when(block == paging.blocks(first, piece) - 1)
    def _():
        out_ref[...] = (mixed[...] / total[...]).astype(out_ref.dtype)


def _stored(cache: PagedLatents, paging: Paging, interpret: bool) -> tuple[list[Any], list[pl.BlockSpec]]:
    """The arrays of the cache, once for each page of a block, and their block specs."""
    held = [cache.k] if cache.k_scale is None else [cache.k, cache.k_scale]
    arrays = [x for x in held for _ in range(paging.pages)]
    specs = [
        pl.BlockSpec((None, None, *x.shape[2:]), functools.partial(paging.stored, at, True))
        for x in held
        for at in range(paging.pages)
    ]
    if not interpret:  # otherwise XLA copies a small pool into VMEM: all layers, in every layer
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
    return arrays, specs


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def paged_latent_attention(
    q: Float[Array, "B T N C"],
    rope: Float[Array, "B T N R"],
    cache: PagedLatents,
    layer: ArrayLike,
    first: Int[Array, "B"],
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N C"]:
    """`latent_attention.latent_attention` over the pages of each row."""
    batch, width, heads, rank = q.shape
    lanes, page = TOKENS * rope.shape[-1], cache.k.shape[2]
    rows = few.query_rows(q, rope)
    count = rows.shape[1]
    paging = Paging.of(tiling_of(batch, width, cache.table.shape[1] * page, cache.k.shape[3]), page)
    first = first.astype(jnp.int32)
    (arrays, specs), (items, blocks, steps) = _stored(cache, paging, interpret), work_list(paging, first)

    def own(_, step, layer, first, items, *refs):
        return items[step], 0, 0

    out = pl.pallas_call(
        functools.partial(_few_kernel, paging=paging, rank=rank, factor=scale),
        out_shape=jax.ShapeDtypeStruct((batch, count, rank), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(1, steps),
            in_specs=[pl.BlockSpec((None, *rows.shape[1:]), own), *specs],
            out_specs=pl.BlockSpec((None, count, rank), own),
            scratch_shapes=few.scratch(count, lanes, rank),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=paging.cost(cache, 4 * count * cache.k.shape[3], count * TOKENS, 2 * rows.nbytes),
        interpret=interpret,
        name="paged_latent_attention",
    )(jnp.asarray(layer, jnp.int32).reshape(1), first, items, blocks, cache.table.reshape(-1), rows, *arrays)
    return out[:, : heads * width].reshape(batch, heads, width, rank).transpose(0, 2, 1, 3)


@functools.partial(jax.jit, static_argnames=("interpret",))
def paged_latent_prefill(
    nope: Float[Array, "B T N E"],
    rope: Float[Array, "B T N R"],
    weight: Float[Array, "N F C"],
    cache: PagedLatents,
    layer: ArrayLike,
    first: Int[Array, "B"],
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`latent_prefill.latent_prefill` over the pages of each row."""
    batch, width, heads, nope_dim = nope.shape
    page, (lanes, rank) = cache.k.shape[2], weight.shape[1:]
    sizes = nope_dim, rope.shape[3]
    q, piece = many.query_pieces(nope, rope, lanes)
    tiling = tiling_of(batch, width, cache.table.shape[1] * page, cache.k.shape[3], piece)
    paging, first = Paging.of(tiling, page), first.astype(jnp.int32)
    (arrays, specs), (items, blocks, steps) = _stored(cache, paging, interpret), work_list(paging, first)

    def own(head, step, layer, first, items, *refs):
        row, piece = paging.item(step, items)
        return row, head, piece, 0

    spec = pl.BlockSpec((None, None, piece, lanes), own)
    out = pl.pallas_call(
        functools.partial(_many_kernel, paging=paging, sizes=sizes, factor=sum(sizes) ** -0.5),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(heads, steps),
            in_specs=[spec, pl.BlockSpec((None, lanes, rank), lambda head, *_: (head, 0, 0)), *specs],
            out_specs=spec,
            scratch_shapes=many.scratch(piece, lanes),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=paging.cost(
            cache,
            2 * heads * TOKENS * lanes * (3 * piece + rank),
            heads * TOKENS * piece,
            (2 * q.size + weight.size) * q.dtype.itemsize,
            heads,
        ),
        interpret=interpret,
        name="paged_latent_prefill",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        first,
        items,
        blocks,
        cache.table.reshape(-1),
        q,
        weight.astype(q.dtype),
        *arrays,
    )
    return out[:, :, :width, nope_dim:].transpose(0, 2, 1, 3)
