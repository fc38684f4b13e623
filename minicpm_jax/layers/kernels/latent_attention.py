"""Absorbed latent attention of a few new tokens over the filled part of the stacked latent cache: a Pallas TPU kernel.

Dims: L layers, B batch, T new tokens, N heads, C latent, R rotary key, S cache slots, A = S / 4 entries of the cache,
      M = N T rows of queries.

The cache stays in HBM as [L, B, A, 4C + 4R]: an entry holds the latents of four tokens, then their rotary keys. The
grid is (B, blocks of entries); blocks are fetched as in `cache_attention`, with the last one in parts. A block in VMEM
is keys and values at once, so the latents are read once:

- four products of the queries [M, C] with the four latents of each entry, and one of the rotary queries with all
  rotary keys. For it the queries are four groups of rows [4M, 4R], zero but in the lanes of their own token;
- one running softmax (arXiv 2205.14135) over the four groups;
- four products of the weights with the same latents.
"""

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, ArrayLike, Float, Int

from minicpm_jax.layers.kernels.precision import precision
from minicpm_jax.layers.kernels.softmax import joined
from minicpm_jax.layers.kernels.tiling import FAR, GRAIN, PARTS, Tiling, divided, least
from minicpm_jax.parallel.chips import LANES

TOKENS = 4  # of an entry
ROWS = 512  # most queries of a call: their scores of a block of 256 entries take 2 MiB
BLOCK = 256  # most entries of a block: 0.6 MB of MiniCPM3-4B's in bfloat16


@dataclass(frozen=True)
class LatentTiling(Tiling):
    """`cache_attention.Tiling` with entries for slots: it begins at a token and counts the entries of its tokens."""

    def seen(self, first: Any, piece: Any) -> Any:
        """Number of entries that the tokens of a piece attend to, in a row whose first new token has slot ``first``."""
        last = first + least((piece + 1) * self.piece, self.width) - 1
        return least(divided(last, TOKENS) + 1, self.slots)


def tiling_of(batch: int, width: int, entries: int, lanes: int, piece: int | None = None) -> LatentTiling:
    """The tiling for all new tokens at once, with a last block in parts, or for a ``piece`` of them at a time."""
    block = grain = min(BLOCK, entries)
    while piece is None and grain % (2 * GRAIN) == 0 and grain << PARTS - 1 > block:
        grain //= 2
    return LatentTiling(batch, width, entries, 1, 1, lanes, lanes, piece or width, block, grain)


class LatentCache(Protocol):
    """The arrays of a `kv_cache.LatentCache` that the kernel reads."""

    @property
    def k(self) -> Float[Array, "L B A 4C+4R"]: ...
    @property
    def k_scale(self) -> Float[Array, "L B 8 A"] | None: ...


def runs(q: Float[Array, "B T N C"], rope: Float[Array, "B T N R"]) -> bool:
    """Whether the kernel computes these queries: few, whose latents fill registers, in a dtype that Mosaic has."""
    filled = q.shape[3] % LANES == 0 and TOKENS * rope.shape[3] % LANES == 0
    return filled and q.shape[1] * q.shape[2] <= ROWS and q.dtype != jnp.float16


def query_rows(q: Float[Array, "B T N C"], rope: Float[Array, "B T N R"]) -> Float[Array, "B M C+4R"]:
    """The queries as the kernel takes them: M = N T rows, padded to a multiple of 8."""
    batch, width, heads, _ = q.shape
    both = jnp.concatenate([q, jnp.tile(rope, TOKENS)], axis=-1).transpose(0, 2, 1, 3)
    return jnp.pad(both.reshape(batch, heads * width, -1), [(0, 0), (0, -heads * width % 8), (0, 0)])


def scratch(count: int, lanes: int, rank: int) -> list[Any]:
    """The memory in which `begin` and `accumulate` work, for M rows."""
    shapes = (TOKENS * count, lanes), (count, 1), (count, 1), (count, rank)
    return [pltpu.VMEM(shape, jnp.float32) for shape in shapes]


def _kernel(layer_ref, first_ref, held_ref, q_ref, *refs, tiling: LatentTiling, rank: int, factor: float):
    *stored, out_ref, wide, top, total, mixed = refs
    parts, scratch = len(tiling.parts), (wide, top, total, mixed)
    blocks_of, scales = stored[:parts], stored[parts:]
    row, step = pl.program_id(0), pl.program_id(1)
    first = first_ref[row]
    seen, blocks = tiling.seen(first, 0), tiling.blocks(first, 0)

    @pl.when(step == 0)
    def _():
        begin(q_ref, scratch, rank)

    @pl.when(step < blocks)
    def _():
        block, begins = joined(blocks_of), tiling.begins(seen, step)
        if tiling.slots % tiling.grain:  # what is beyond the last entry may be NaN, and 0 * NaN is NaN
            block = jnp.where(tiling.places((tiling.block, 1), 0, step, begins) < seen, block, jnp.zeros_like(block))
        scale = tiling.in_order(scales[0], step, begins) if scales else None
        entry = tiling.places((1, tiling.block), 1, step, begins)
        accumulate(q_ref[:, :rank], block, scale, entry, first, scratch, tiling.width, factor)

    @pl.when(step == blocks - 1)
    def _():
        out_ref[...] = (mixed[...] / total[...]).astype(out_ref.dtype)


def begin(q_ref: Any, scratch: tuple[Any, ...], rank: int) -> None:
    """Begin the running softmax of a row: ``scratch`` holds the rotary queries, once for each token of an entry, the
    highest score of each row, the sum of the weights and the weighted sum of the latents."""
    wide, top, total, mixed = scratch
    rows, lanes = q_ref.shape[0], wide.shape[1]
    rope = q_ref[:, rank:].astype(jnp.float32)
    own = divided(jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1), lanes // TOKENS)
    for token in range(TOKENS):
        wide[token * rows : (token + 1) * rows] = jnp.where(own == token, rope, 0)
    top[...] = jnp.full(top.shape, jnp.finfo(jnp.float32).min, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    mixed[...] = jnp.zeros(mixed.shape, jnp.float32)


def accumulate(
    q: Float[Array, "M C"],
    block: Array,
    scale: Float[Array, "8 A"] | None,
    entry: Int[Array, "1 A"],
    first: Any,
    scratch: tuple[Any, ...],
    width: int,
    factor: float,
) -> None:
    """Add a block [A, 4C + 4R] of these entries of the cache. ``first``: slot of the first of ``width`` new tokens."""
    wide, top, total, mixed = scratch
    rows, rank = q.shape
    if scale is not None:
        block = block.astype(jnp.float32).astype(q.dtype)
    rotary = product(wide[...].astype(q.dtype), block[:, TOKENS * rank :], 1)  # [4M, A]
    at = first + jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0), width)
    higher, scores = top[...], []
    for token in range(TOKENS):
        latent, turned = product(q, latent_of(block, token, rank), 1), rotary[token * rows : (token + 1) * rows]
        if scale is not None:
            latent = latent * scale[token : token + 1]
            turned = turned * scale[TOKENS + token : TOKENS + token + 1]
        # A slot that no token sees: FAR entries stay beyond every slot, as FAR * 4 is no int32.
        visible = (entry < FAR) & (least(entry, FAR // TOKENS) * TOKENS + token <= at)
        scores.append(jnp.where(visible, (latent + turned) * factor, jnp.finfo(jnp.float32).min))
        higher = jnp.maximum(higher, jnp.max(scores[-1], axis=1, keepdims=True))
    fade = jnp.exp(top[...] - higher)
    top[...] = higher
    new, added = total[...] * fade, mixed[...] * fade
    for token in range(TOKENS):
        weights = jnp.exp(scores[token] - higher)
        new += jnp.sum(weights, axis=1, keepdims=True)
        if scale is not None:
            weights = weights * scale[token : token + 1]
        added += product(weights.astype(q.dtype), latent_of(block, token, rank), 0)
    total[...], mixed[...] = new, added


def product(x: Array, y: Array, contracted: int) -> Array:
    """x [M, X] times y [X, Y] (``contracted`` 0) or y [Y, X] (1), in float32."""
    dims = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision(x), preferred_element_type=jnp.float32)


def latent_of(block: Array, token: int, rank: int) -> Array:
    """The latents [A, C] of one token of each entry."""
    return block[:, token * rank : (token + 1) * rank]


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def latent_attention(
    q: Float[Array, "B T N C"],
    rope: Float[Array, "B T N R"],
    cache: LatentCache,
    layer: ArrayLike,
    first: Int[Array, "B"],
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N C"]:
    """softmax(scale * q k) latents over one layer of the cache, which already holds the new tokens.

    Arguments:
        q: the queries of T consecutive tokens per row, multiplied into the latents' space.
        rope: their rotary parts.
        cache: latents and rotary keys of all layers.
        layer: index of the layer.
        first: [B] slot of each row's first new token; a token attends to the slots up to its own.
        scale: of the scores.
        interpret: run the kernel without a TPU.

    Scores, softmax and sums are float32; the weights are rounded to the dtype of ``q`` before the product with the
    latents.
    """
    batch, width, heads, rank = q.shape
    rows = query_rows(q, rope)
    count, lanes = rows.shape[1], TOKENS * rope.shape[-1]
    tiling = tiling_of(batch, width, cache.k.shape[2], cache.k.shape[3])
    first = first.astype(jnp.int32)

    def index_map(stored: Any) -> Any:
        """An index map of `Tiling` for a grid of rows and blocks."""
        return lambda row, step, *refs: stored(row, 0, 0, step, *refs)

    arrays = [cache.k] * len(tiling.parts)
    specs = [
        pl.BlockSpec((None, None, tiling.size(part), tiling.lanes), index_map(functools.partial(tiling.stored, part)))
        for part in tiling.parts
    ]
    if cache.k_scale is not None:
        arrays.append(cache.k_scale)
        specs.append(pl.BlockSpec((None, None, 2 * TOKENS, tiling.block), index_map(tiling.scale)))
    if not interpret:  # otherwise XLA copies a small cache into VMEM: all layers, in every layer
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
    out = pl.pallas_call(
        functools.partial(_kernel, tiling=tiling, rank=rank, factor=scale),
        out_shape=jax.ShapeDtypeStruct((batch, count, rank), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, tiling.grid(first)[3]),
            in_specs=[pl.BlockSpec((None, *rows.shape[1:]), lambda row, *_: (row, 0, 0)), *specs],
            out_specs=pl.BlockSpec((None, count, rank), lambda row, *_: (row, 0, 0)),
            scratch_shapes=scratch(count, lanes, rank),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(tiling, rows, cache),
        interpret=interpret,
        name="latent_attention",
    )(jnp.asarray(layer, jnp.int32).reshape(1), first, tiling.held(first), rows, *arrays)
    return out[:, : heads * width].reshape(batch, heads, width, rank).transpose(0, 2, 1, 3)


def _cost(tiling: LatentTiling, queries: Float[Array, "B M C+4R"], cache: LatentCache) -> pl.CostEstimate:
    """The cost for rows that fill the cache: it is declared before their fill is known."""
    batch, rows, _ = queries.shape
    entries = batch * tiling.slots
    held = entries * tiling.lanes * cache.k.dtype.itemsize
    held += 0 if cache.k_scale is None else entries * 2 * TOKENS * 4
    return pl.CostEstimate(
        flops=4 * rows * entries * tiling.lanes,
        transcendentals=rows * entries * TOKENS,
        bytes_accessed=held + 2 * queries.size * queries.dtype.itemsize,
    )
