"""Latent attention of a chunk of a prompt over the filled part of the stacked latent cache: a Pallas TPU kernel that
expands the keys and values of one head at a time.

Dims: L layers, B batch, T new tokens, N heads, C latent, R rotary key, E = width of a key's part without RoPE, H value
      width, F = E + H, A = S / 4 entries of the cache, t tokens of a piece.

The grid is (B, N, pieces, blocks of entries). From the latents of a block [A, C] and the matrix of the head [F, C]
follow keys and values together, [A, F]. They are never separated: a query is zero in the lanes of the values, and of
weights times both only the lanes of the values are kept. Nothing that is expanded is written to HBM.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, ArrayLike, Float, Int

from minicpm_jax.layers.kernels.latent_attention import TOKENS, LatentCache, LatentTiling, latent_of, product, tiling_of
from minicpm_jax.layers.kernels.tiling import divided
from minicpm_jax.parallel.chips import LANES

PIECE = 512  # most tokens of a step: their scores of a block of 256 entries take 2 MiB


def runs(nope: Float[Array, "B T N E"], rope: Float[Array, "B T N R"], weight: Float[Array, "N F C"]) -> bool:
    """Whether the kernel computes these: keys and values, and four rotary keys, that fill registers alike."""
    lanes, rank = weight.shape[1:]
    fits = lanes == TOKENS * rope.shape[3] and nope.shape[3] + rope.shape[3] <= lanes
    return fits and lanes % LANES == 0 and rank % LANES == 0 and nope.dtype != jnp.float16


def query_pieces(
    nope: Float[Array, "B T N E"], rope: Float[Array, "B T N R"], lanes: int
) -> tuple[Float[Array, "B N T F"], int]:
    """The queries as the kernel takes them, T padded to a multiple of a piece; and t."""
    width = nope.shape[1]
    piece = min(PIECE, -(-width // 16) * 16)  # 16 rows of bfloat16 are a tile
    q = jnp.concatenate([nope, rope], axis=-1).transpose(0, 2, 1, 3)
    return jnp.pad(q, [(0, 0), (0, 0), (0, -width % piece), (0, lanes - q.shape[3])]), piece


def scratch(piece: int, lanes: int) -> list[Any]:
    """The memory in which `begin` and `accumulate` work."""
    shapes = ((TOKENS + 1) * piece, lanes), (piece, 1), (piece, 1), (piece, lanes)
    return [pltpu.VMEM(shape, jnp.float32) for shape in shapes]


def _kernel(
    layer_ref,
    first_ref,
    held_ref,
    q_ref,
    weight_ref,
    *refs,
    tiling: LatentTiling,
    sizes: tuple[int, int],
    factor: float,
):
    block_ref, *scales, out_ref, queries, top, total, mixed = refs
    row, piece, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    first, scratch = first_ref[row], (queries, top, total, mixed)
    seen, blocks = tiling.seen(first, piece), tiling.blocks(first, piece)

    @pl.when(step == 0)
    def _():
        begin(q_ref, scratch, sizes)

    @pl.when(step < blocks)
    def _():
        block, entry = block_ref[...], step * tiling.block + jax.lax.broadcasted_iota(jnp.int32, (1, tiling.block), 1)
        if tiling.slots % tiling.block:  # what is beyond the last entry may be NaN, and 0 * NaN is NaN
            at = step * tiling.block + jax.lax.broadcasted_iota(jnp.int32, (tiling.block, 1), 0)
            block = jnp.where(at < seen, block, jnp.zeros_like(block))
        scale = jnp.where(entry < tiling.slots, scales[0][...], 0) if scales else None
        before = first + piece * tiling.piece
        accumulate(q_ref.dtype, block, scale, weight_ref[...], entry, before, scratch, factor)

    @pl.when(step == blocks - 1)
    def _():
        out_ref[...] = (mixed[...] / total[...]).astype(out_ref.dtype)


def begin(q_ref: Any, scratch: tuple[Any, ...], sizes: tuple[int, int]) -> None:
    """Begin the running softmax of a piece: ``scratch`` holds the queries without RoPE, then the rotary queries in the
    lanes of each token's rotary key; the highest score of each row, the sum of the weights and the weighted sum of the
    keys and values. ``sizes``: E and R."""
    queries, top, total, mixed = scratch
    (rows, lanes), (nope_dim, rope_dim) = q_ref.shape, sizes
    q, lane = q_ref[...].astype(jnp.float32), jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
    queries[:rows] = jnp.where(lane < nope_dim, q, 0)
    for token in range(TOKENS):
        turned = pltpu.roll(q, (token * rope_dim - nope_dim) % lanes, 1)
        own = divided(lane, rope_dim) == token
        queries[(token + 1) * rows : (token + 2) * rows] = jnp.where(own, turned, 0)
    top[...] = jnp.full(top.shape, jnp.finfo(jnp.float32).min, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    mixed[...] = jnp.zeros(mixed.shape, jnp.float32)


def accumulate(
    dtype: Any,
    block: Array,
    scale: Float[Array, "8 A"] | None,
    weight: Float[Array, "F C"],
    entry: Int[Array, "1 A"],
    before: Any,
    scratch: tuple[Any, ...],
    factor: float,
) -> None:
    """Add a block [A, 4C + 4R] of these entries of the cache. ``before``: slots before the piece's first token."""
    queries, top, total, mixed = scratch
    rows, rank = mixed.shape[0], weight.shape[1]
    if scale is not None:
        block = block.astype(jnp.float32).astype(dtype)
    at = before + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    rotary = block[:, TOKENS * rank :]
    for token in range(TOKENS):
        both = product(latent_of(block, token, rank), weight, 1).astype(dtype)  # [A, F]
        scores = product(queries[:rows].astype(dtype), both, 1)
        turned = product(queries[(token + 1) * rows : (token + 2) * rows].astype(dtype), rotary, 1)
        if scale is not None:
            scores = scores * scale[token : token + 1]
            turned = turned * scale[TOKENS + token : TOKENS + token + 1]
        scores = (scores + turned) * factor
        # Slot 0, which every token sees, comes first: slots that are not seen get weight 0 from there on.
        scores = jnp.where(entry * TOKENS + token <= at, scores, jnp.finfo(jnp.float32).min)
        higher = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
        weights, fade = jnp.exp(scores - higher), jnp.exp(top[...] - higher)
        top[...] = higher
        total[...] = total[...] * fade + jnp.sum(weights, axis=1, keepdims=True)
        if scale is not None:
            weights = weights * scale[token : token + 1]
        mixed[...] = mixed[...] * fade + product(weights.astype(dtype), both, 0)


@functools.partial(jax.jit, static_argnames=("interpret",))
def latent_prefill(
    nope: Float[Array, "B T N E"],
    rope: Float[Array, "B T N R"],
    weight: Float[Array, "N F C"],
    cache: LatentCache,
    layer: ArrayLike,
    first: Int[Array, "B"],
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(E + R)) v over one layer of the cache, which already holds the new tokens.

    Arguments:
        nope, rope: the two parts of the queries of T consecutive tokens per row.
        weight: the matrices that expand a latent to the key (without RoPE) and the value of each head.
        cache: latents and rotary keys of all layers.
        layer: index of the layer.
        first: [B] slot of each row's first new token; a token attends to the slots up to its own.
        interpret: run the kernel without a TPU.

    Scores, softmax and sums are float32; keys, values and weights are rounded to the dtype of the queries.
    """
    batch, width, heads, nope_dim = nope.shape
    rope_dim, (lanes, rank) = rope.shape[3], weight.shape[1:]
    q, piece = query_pieces(nope, rope, lanes)
    tiling = tiling_of(batch, width, cache.k.shape[2], cache.k.shape[3], piece)
    first = first.astype(jnp.int32)
    arrays = [cache.k] if cache.k_scale is None else [cache.k, cache.k_scale]
    if not interpret:  # otherwise XLA copies a small cache into VMEM: all layers, in every layer
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]

    def stored(row, head, piece, step, *refs):
        return tiling.stored(0, row, 0, piece, step, *refs)

    def scale(row, head, piece, step, *refs):
        return tiling.scale(row, 0, piece, step, *refs)

    own = pl.BlockSpec((None, None, piece, lanes), lambda row, head, piece, *_: (row, head, piece, 0))
    stored_specs = [
        pl.BlockSpec((None, None, tiling.block, tiling.lanes), stored),
        pl.BlockSpec((None, None, 2 * TOKENS, tiling.block), scale),
    ]
    out = pl.pallas_call(
        functools.partial(_kernel, tiling=tiling, sizes=(nope_dim, rope_dim), factor=(nope_dim + rope_dim) ** -0.5),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, *tiling.grid(first)[2:]),
            in_specs=[
                own,
                pl.BlockSpec((None, lanes, rank), lambda row, head, *_: (head, 0, 0)),
                *stored_specs[: len(arrays)],
            ],
            out_specs=own,
            scratch_shapes=scratch(piece, lanes),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        cost_estimate=_cost(tiling, q, weight, cache),
        interpret=interpret,
        name="latent_prefill",
    )(jnp.asarray(layer, jnp.int32).reshape(1), first, tiling.held(first), q, weight.astype(q.dtype), *arrays)
    return out[:, :, :width, nope_dim:].transpose(0, 2, 1, 3)


def _cost(tiling: LatentTiling, q: Array, weight: Array, cache: LatentCache) -> pl.CostEstimate:
    """The cost for rows that fill the cache: it is declared before their fill is known."""
    batch, heads, rows, lanes = q.shape
    steps = sum(tiling.seen(tiling.slots * TOKENS - tiling.width, piece) for piece in range(tiling.pieces))
    slots = int(steps) * batch * heads * TOKENS  # slots that a piece attends to, of each row and head
    entry = tiling.lanes * cache.k.dtype.itemsize + (0 if cache.k_scale is None else 2 * TOKENS * 4)
    return pl.CostEstimate(
        flops=2 * slots * lanes * (3 * tiling.piece + weight.shape[2]),
        transcendentals=slots * tiling.piece,
        bytes_accessed=slots // TOKENS * entry + (2 * q.size + weight.size) * q.dtype.itemsize,
    )
