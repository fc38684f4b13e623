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

Two heads of 64 share 128 lanes, and separating them would move every key. Instead a query is zero in the lanes of
the other heads: one product over W lanes gives its scores, and of weights times values only its own lanes are kept.
A matrix unit is 128 wide (v6e: 256) for any head dimension, so this costs nothing within a pair of heads. With all
heads in one group (decoding: few rows) it takes the time of loading keys and values into the unit, which any product
needs.

JAX's own kernels cannot read this cache. Paged and ragged paged attention need pages with the head as an axis (a
head of 64 is padded to 128 lanes); splash and flash attention need one layer's keys by head, and cannot skip
unfilled slots.

Source of the running softmax: arXiv 2205.14135.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, ArrayLike, Float, Int

from minicpm_jax.layers.kernels.precision import precision
from minicpm_jax.parallel.chips import LANES

GRAIN = 8  # slots of a tile in HBM, the smallest fetch
PARTS = 6  # most sub-blocks of a block: each costs the scalar unit about 0.07 us per step on a v5e
FAR = 1 << 30  # beyond every slot
ROWS = 1024  # most queries of a step: with 512 slots their scores take 2 MiB
FEW = 128  # up to this many queries run as one group: the matrix unit multiplies them while it loads the next keys
BLOCK = 512  # most slots of a step
BLOCK_BYTES = 5 << 18  # 1.25 MiB, most of one block of keys: VMEM (16 MiB) holds four such blocks
# For decoding half of it: the first step fetches a whole block, and each step computes on one. That is 128 slots of the
# 2B, whose keys and values a v5e fetches in 1.4 us; by the length of the program the rest of a step takes 0.9 us.


@dataclass(frozen=True)
class Tiling:
    """The tiling of the work: everything that the grid and the index maps depend on except the fill of the rows."""

    batch: int
    width: int  # T
    slots: int  # S
    kv_heads: int  # K
    heads_per_kv: int  # G
    head_dim: int  # H
    lanes: int  # W
    piece: int  # t
    block: int  # slots of a block
    grain: int  # slots of its smallest sub-block; block / grain is a power of 2

    @staticmethod
    def of(batch: int, width: int, heads: int, head_dim: int, slots: int, kv_heads: int, itemsize: int) -> "Tiling":
        """The tiling for queries [batch, width, heads, head_dim] and a cache of ``slots`` with elements of
        ``itemsize`` bytes."""
        lanes, few = kv_heads * head_dim, heads * width <= FEW
        pair = math.lcm(LANES, head_dim)
        if not few and lanes % pair == 0:
            lanes = pair
        rows = lanes // head_dim * (heads // kv_heads)  # of one token
        piece = width
        if not few:
            most = 1 << max(4, (ROWS // rows).bit_length() - 1)
            piece = min(most, -(-width // 16) * 16)  # 16 rows of bfloat16 are a tile
        block, most_bytes = BLOCK, BLOCK_BYTES // 2 if few else BLOCK_BYTES
        while block > 128 and block * lanes * itemsize > most_bytes:
            block //= 2
        block = grain = min(block, slots)
        while few and grain % (2 * GRAIN) == 0 and grain << PARTS - 1 > block:
            grain //= 2
        return Tiling(batch, width, slots, kv_heads, heads // kv_heads, head_dim, lanes, piece, block, grain)

    @property
    def heads(self) -> int:
        """C: key/value heads of a group."""
        return self.lanes // self.head_dim

    @property
    def groups(self) -> int:
        return self.kv_heads // self.heads

    @property
    def pieces(self) -> int:
        return pl.cdiv(self.width, self.piece)

    @property
    def rows(self) -> int:
        return self.heads * self.heads_per_kv * self.piece

    @property
    def parts(self) -> tuple[int, ...]:
        """The sub-blocks of a block, n .. 0. Sub-block 0 is the grain that every block has; sub-block i > 0 is
        needed if the number of grains before it has binary digit i - 1."""
        return tuple(reversed(range((self.block // self.grain).bit_length())))

    def size(self, part: Any) -> Any:
        """Slots of a sub-block."""
        return self.grain << (part - (part > 0))

    def begin(self, part: Any) -> Any:
        """First slot of a sub-block in a full block."""
        return self.block - (self.grain << part)

    def seen(self, first: Any, piece: Any) -> Any:
        """Number of slots that the tokens of a piece attend to, in a row whose first new token has slot ``first``."""
        return least(first + least((piece + 1) * self.piece, self.width), self.slots)

    def blocks(self, first: Any, piece: Any) -> Any:
        """Number of blocks that hold them."""
        return divided(self.seen(first, piece) - 1, self.block) + 1

    def cut(self, part: Any, filled: Any) -> tuple[Any, Any]:
        """Offset of a sub-block within a block whose first ``filled`` slots (at least one) are filled, and whether
        it is needed."""
        grains = divided(filled - 1, self.grain)
        return (grains >> part << part) * self.grain, (2 * grains + 1) >> part & 1 == 1

    def begins(self, seen: Any, step: Any) -> list[tuple[Any, Any]]:
        """`cut` of each sub-block in the block of a step, of a row whose first ``seen`` slots are attended to."""
        return [self.cut(part, least(seen - step * self.block, self.block)) for part in self.parts]

    def places(self, shape: tuple[int, int], axis: int, step: Any, begins: list[tuple[Any, Any]]) -> Array:
        """The cache slots in the block of a step, along an axis. Slots of a sub-block that is not needed get a number
        beyond the cache."""
        place = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        moved = jnp.zeros(shape, jnp.int32)
        for begin, (offset, needed) in zip(map(self.begin, self.parts), begins, strict=True):
            moved = jnp.where(place >= begin, jnp.where(needed, offset - begin, FAR), moved)
        return step * self.block + place + moved

    def in_order(self, scale: Any, step: Any, begins: list[tuple[Any, Any]]) -> Array:
        """The scales [X, block] of a block, in the order of its slots: in a last block they are rolled to where its
        sub-blocks are."""
        place = jax.lax.broadcasted_iota(jnp.int32, (1, self.block), 1)
        whole = rolled = jnp.where(step * self.block + place < self.slots, scale[...], 0)
        for begin, (offset, _) in zip(map(self.begin, self.parts), begins, strict=True):
            if begin:
                rolled = jnp.where(place >= begin, pltpu.roll(whole, begin - offset, 1), rolled)
        return rolled

    def grid(self, first: Any) -> tuple[Any, ...]:
        """(B, groups, pieces, blocks of the fullest row) for rows whose first new tokens have the slots ``first``
        [B]."""
        return self.batch, self.groups, self.pieces, self.blocks(first, self.pieces - 1).max()

    def held(self, first: Int[Array, "B"]) -> Int[Array, "B*pieces*parts*2"]:
        """Row and block index that each sub-block holds from the last block of each row's piece on: of that block,
        of the one before it, or of an earlier row; the first slots if there is none. It is written so that XLA makes
        one fusion of it, because it runs in every layer."""
        count, parts = self.batch * self.pieces, len(self.parts)
        entry, other = jnp.arange(count * parts * 2), jnp.arange(count)[:, None]
        at, part = entry // (2 * parts), parts - 1 - entry // 2 % parts
        first = jnp.repeat(first, self.pieces)[:, None]
        seen = self.seen(first, other % self.pieces)
        last = divided(seen - 1, self.block)
        offset, needed = self.cut(part, seen - last * self.block)
        slot = last * self.block + jnp.where(needed, offset, self.begin(part) - self.block)
        place = other // self.pieces * self.slots + slot  # it grows from row to row
        place = jnp.max(jnp.where((other <= at) & (slot >= 0), place, 0), axis=0)
        return jnp.where(entry % 2 == 0, place // self.slots, place % self.slots // self.size(part))

    def stored(
        self, part: int, row: Any, group: Any, piece: Any, step: Any, layer: Any, first: Any, held: Any
    ) -> tuple[Any, ...]:
        """Index map of one sub-block of the keys, or of the values, [L, B, S, K H]."""
        size, parts = self.size(part), len(self.parts)
        end = 2 * parts * (row * self.pieces + piece + 1)  # of the piece's entries: the last is of part 0
        full = step < held[end - 1] >> parts - 1
        index = step * (self.block // size) + self.begin(part) // size
        entry = end - 2 * (part + 1)
        return layer[0], _chosen(full, row, held[entry]), _chosen(full, index, held[entry + 1]), group

    def scale(self, row: Any, group: Any, piece: Any, step: Any, layer: Any, first: Any, held: Any) -> tuple[Any, ...]:
        """Index map of the scales [L, B, X, S]: all heads at once, because they are few."""
        return layer[0], row, 0, least(step, self.blocks(first[row], piece) - 1)


def least(x: Any, y: Any) -> Any:
    return (jnp if isinstance(x, jax.Array) or isinstance(y, jax.Array) else np).minimum(x, y)


def _chosen(condition: Any, x: Any, y: Any) -> Any:
    return (jnp if isinstance(condition, jax.Array) else np).where(condition, x, y)


def divided(x: Any, by: int) -> Any:
    """x // by for x >= 0. JAX's ``//`` handles signs, for which Mosaic asks the default device for its type; that
    device is no TPU when compiling for one elsewhere."""
    return jax.lax.div(x, jnp.int32(by)) if isinstance(x, jax.Array) else x // by


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
    span = tiling.heads_per_kv * tiling.piece  # rows of one key/value head

    def own(head: int) -> Array:
        """The lanes [1, W] of one head of the group."""
        return divided(jax.lax.broadcasted_iota(jnp.int32, (1, tiling.lanes), 1), tiling.head_dim) == head

    @pl.when(step == 0)
    def _():
        q = q_ref[...].astype(jnp.float32)
        for head in range(tiling.heads):
            wide[head * span : (head + 1) * span] = jnp.where(own(head), q, 0)
        top[...] = jnp.full(top.shape, jnp.finfo(jnp.float32).min, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        mixed[...] = jnp.zeros(mixed.shape, jnp.float32)

    @pl.when(step < blocks)
    def _():
        q, k, v = wide[...].astype(q_ref.dtype), joined(keys), joined(values)
        exact = precision(q)
        begins = tiling.begins(seen, step)
        slot = tiling.places((1, tiling.block), 1, step, begins)
        if tiling.slots % tiling.grain:  # values beyond the last slot may be NaN, and 0 * NaN is NaN
            v = jnp.where(tiling.places((tiling.block, 1), 0, step, begins) < seen, v, jnp.zeros_like(v))
        if scales:
            k, v = (x.astype(jnp.float32).astype(q.dtype) for x in (k, v))
        scores = jax.lax.dot_general(
            q, k, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
        )
        scores = scores * tiling.head_dim**-0.5
        if scales:
            scores = scores * of_rows(tiling.in_order(scales[0], step, begins), group, tiling)
        at = (
            first
            + piece * tiling.piece
            + jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (tiling.rows, 1), 0), tiling.piece)
        )
        scores = jnp.where(slot <= at, scores, jnp.finfo(jnp.float32).min)
        # Slot 0, which every token sees, is in the first block: masked slots get weight 0 from here on.
        higher = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - higher)
        fade = jnp.exp(top[...] - higher)
        top[...] = higher
        total[...] = total[...] * fade + jnp.sum(weights, axis=1, keepdims=True)
        if scales:
            weights = weights * of_rows(tiling.in_order(scales[1], step, begins), group, tiling)
        mixed[...] = mixed[...] * fade + jnp.dot(
            weights.astype(v.dtype), v, precision=exact, preferred_element_type=jnp.float32
        )

    @pl.when(step == blocks - 1)
    def _():
        out = jnp.zeros(out_ref.shape, jnp.float32)
        for head in range(tiling.heads):
            part = slice(head * span, (head + 1) * span)
            out = out + jnp.where(own(head), mixed[part] / total[part], 0)
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
    padded = jnp.pad(q, ((0, 0), (0, tiling.pieces * tiling.piece - width), (0, 0), (0, 0)))
    shape = (batch, tiling.pieces, tiling.piece, tiling.groups, tiling.heads, tiling.heads_per_kv, head_dim)
    transposed = padded.reshape(shape).transpose(0, 3, 1, 5, 2, 4, 6)  # [B, groups, pieces, G, t, C, H]
    flat = transposed.reshape(batch, tiling.groups, tiling.pieces, tiling.heads_per_kv * tiling.piece, tiling.lanes)

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
    out = out.reshape(transposed.shape).transpose(0, 2, 4, 1, 5, 3, 6)  # [B, pieces, t, groups, C, G, H]
    return out.reshape(batch, -1, heads * head_dim)[:, :width]
