"""Attention of T new tokens over the filled part of the stacked cache: one Pallas TPU kernel for prompts and
decoding.

Dims: L layers, B batch, T new tokens, S cache slots, N query heads, K key/value heads, G = N / K, H head dimension.
      In the kernel: W lanes hold the C = W / H key/value heads of one group, a piece is t of the T tokens,
      R = C G t rows are its queries.

The cache stays in HBM as [L, B, S, K H]. The grid (B, groups, pieces, blocks of slots) reads blocks [slots, W] of
one layer. A row's blocks stop at its fill: later grid steps name its last block again, which Pallas does not fetch
again, and compute nothing. The grid has as many steps as the fullest row needs.

For decoding, each block is fetched as sub-blocks of 1/2, 1/4, ... down to one 8-slot grain, plus one extra grain.
For a row's last, partly filled block only the sub-blocks that sum to its fill are fetched. They cover consecutive
slots, so their slots differ from those of a full block. A sub-block that is not needed keeps the index of the fetch
before it, so nothing is fetched; its values, of this row or an earlier one, are masked.

JAX's own kernels cannot read this cache. Paged and ragged paged attention need pages with the head as an axis (a
head of 64 is padded to 128 lanes); splash and flash attention need one layer's keys by head, and cannot skip
unfilled slots.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, ArrayLike, Float, Int

from minicpm_jax.layers.kernels.softmax import accumulate, begin, by_group, by_token, finish, joined, of_rows
from minicpm_jax.layers.kernels.tiling import Tiling


def scale_bytes(tiling: Tiling) -> int:
    """Bytes of a block's scales, in tiles of 8 heads."""
    return tiling.block * -(-tiling.kv_heads // 8) * 8 * 4


def cost(tiling: Tiling, itemsize: int, query_itemsize: int, scaled: bool = False) -> pl.CostEstimate:
    """The cost for rows that fill the cache: it is declared before their fill is known."""
    size = 0
    for piece in range(tiling.pieces):
        first = tiling.slots - tiling.width
        size += pl.cdiv(tiling.seen(first, piece), tiling.grain) * tiling.grain * tiling.lanes * itemsize
        size += tiling.blocks(first, piece) * scale_bytes(tiling) if scaled else 0
    fetched = 2 * tiling.batch * tiling.groups * int(size)
    queries = tiling.batch * tiling.width * tiling.kv_heads * tiling.heads_per_kv
    return pl.CostEstimate(
        flops=4 * queries * tiling.slots * tiling.head_dim,
        transcendentals=queries * tiling.slots,
        bytes_accessed=fetched + 2 * queries * tiling.head_dim * query_itemsize,
    )


def _kernel(layer_ref, first_ref, held_ref, q_ref, *refs, tiling: Tiling):
    *stored, out_ref, wide, top, total, mixed = refs
    parts = len(tiling.parts)
    keys, values, scales = stored[:parts], stored[parts : 2 * parts], stored[2 * parts :]
    row, group, piece, step = (pl.program_id(axis) for axis in range(4))
    first = first_ref[row]
    seen, blocks = tiling.seen(first, piece), tiling.blocks(first, piece)

    @pl.when(step == 0)
    def _():
        begin(q_ref, (wide, top, total, mixed), tiling)

    @pl.when(step < blocks)
    def _():
        begins, v = tiling.begins(seen, step), joined(values)
        if tiling.slots % tiling.grain:  # values beyond the last slot may be NaN, and 0 * NaN is NaN
            v = jnp.where(tiling.places((tiling.block, 1), 0, step, begins) < seen, v, jnp.zeros_like(v))
        of_keys, of_values = [of_rows(tiling.in_order(x, step, begins), group, tiling) for x in scales] or [None, None]
        slot = tiling.places((1, tiling.block), 1, step, begins)
        before = first + piece * tiling.piece
        accumulate(q_ref.dtype, joined(keys), v, slot, before, (of_keys, of_values), (wide, top, total, mixed), tiling)

    @pl.when(step == blocks - 1)
    def _():
        finish(out_ref, (wide, top, total, mixed), tiling)


class Cache(Protocol):
    """The arrays of a `kv_cache.Cache` that the kernel reads."""

    @property
    def k(self) -> Float[Array, "L B S KH"]: ...
    @property
    def v(self) -> Float[Array, "L B S KH"]: ...
    @property
    def k_scale(self) -> Float[Array, "L B X S"] | None: ...
    @property
    def v_scale(self) -> Float[Array, "L B X S"] | None: ...
    @property
    def slots(self) -> int: ...


@functools.partial(jax.jit, static_argnames="interpret")
def cache_attention(
    q: Float[Array, "B T N H"],
    cache: Cache,
    layer: ArrayLike,
    first: Int[Array, "B"],
    interpret: bool = False,
) -> Float[Array, "B T NH"]:
    """softmax(q k / sqrt(H)) v over one layer of the cache, which already holds the new tokens' keys and values.

    Arguments:
        q: the queries of T consecutive tokens per row.
        cache: keys and values of all layers; for int8, scores and weights are scaled instead of keys and values.
        layer: index of the layer.
        first: [B] slot of each row's first new token; a token attends to the slots up to its own.
        interpret: run the kernel without a TPU.

    Scores, softmax and sums are float32; the weights are rounded to the dtype of ``q`` before the product with the
    values.
    """
    batch, width, heads, head_dim = q.shape
    itemsize, scaled = cache.k.dtype.itemsize, cache.k_scale is not None
    tiling = Tiling.of(batch, width, heads, head_dim, cache.slots, cache.k.shape[3] // head_dim, itemsize)
    flat = by_group(q, tiling)
    queries = pl.BlockSpec((None, None, None, *flat.shape[3:]), lambda row, group, piece, *_: (row, group, piece, 0, 0))
    stored = [
        pl.BlockSpec((None, None, tiling.size(part), tiling.lanes), functools.partial(tiling.stored, part))
        for part in tiling.parts
    ]
    arrays, specs = [cache.k] * len(stored) + [cache.v] * len(stored), stored * 2
    if cache.k_scale is not None and cache.v_scale is not None:
        arrays += [cache.k_scale, cache.v_scale]
        specs += [pl.BlockSpec((None, None, cache.k_scale.shape[2], tiling.block), tiling.scale)] * 2
    if not interpret:  # otherwise XLA copies a small cache into VMEM: all layers, in every layer
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
    first = first.astype(jnp.int32)
    rows = tiling.heads * flat.shape[3]
    out = pl.pallas_call(
        functools.partial(_kernel, tiling=tiling),
        out_shape=jax.ShapeDtypeStruct(flat.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=tiling.grid(first),
            in_specs=[queries, *specs],
            out_specs=queries,
            scratch_shapes=[pltpu.VMEM((rows, lanes), jnp.float32) for lanes in (tiling.lanes, 1, 1, tiling.lanes)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        cost_estimate=cost(tiling, itemsize, q.dtype.itemsize, scaled),
        interpret=interpret,
        name="cache_attention",
    )(jnp.asarray(layer, jnp.int32).reshape(1), first, tiling.held(first), flat, *arrays)
    return by_token(out, tiling)
