"""Causal self-attention with rotary positions and a key/value cache.

Dims as in model.py: B batch, T new tokens, S cache slots, N query heads, K key/value heads, G = N / K,
      H head dimension.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from minicpm_jax.arithmetic import precision
from minicpm_jax.cache import Cache, placement
from minicpm_jax.kernels.cache_attention import cache_attention
from minicpm_jax.kernels.causal_attention import causal_attention
from minicpm_jax.sharding import by_heads, row_axes
from weights_io.config import ModelConfig

BLOCK = 512  # most tokens, or cache slots, that XLA's form of attention takes together; half as many for one new token
TOGETHER = 256  # most numbers of a cache slot whose heads it takes together for one new token
SCORES = 1 << 19  # most scores that it makes together for several


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


def worked_out(positions: Positions) -> Positions:
    """The same, where the layers are no loop: as products with ones, which are exact and which XLA:CPU makes once. It
    would work out sines and cosines in each layer, for each of its heads."""
    ones = jnp.eye(positions.cos.shape[-1])
    cos, sin = (jnp.matmul(x, ones, precision=jax.lax.Precision.HIGHEST) for x in (positions.cos, positions.sin))
    return dataclasses.replace(positions, cos=cos, sin=sin)


def rotate(x: Float[Array, "B T X H"], positions: Positions) -> Float[Array, "B T X H"]:
    """Turn each pair (h, h + H/2) by its angle, in float32, and round back to x's dtype. The halves change places by a
    product with ones, which is exact: cut out, 32 numbers of 64 would each fill 128 lanes of a TPU, a third of the
    bytes that attention moves in training."""
    head_dim = x.shape[-1]
    places = jnp.asarray(np.eye(head_dim, k=head_dim // 2) - np.eye(head_dim, k=-head_dim // 2), x.dtype)
    exact = {"precision": precision(x), "preferred_element_type": jnp.float32}
    turned = jnp.einsum("btxh,hg->btxg", x, places, **exact)  # -second, first
    return (x.astype(jnp.float32) * positions.cos[:, :, None] + turned * positions.sin[:, :, None]).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, projections: dict[str, nnx.Module], config: ModelConfig):
        self.q_proj, self.k_proj = projections["q_proj"], projections["k_proj"]
        self.v_proj, self.o_proj = projections["v_proj"], projections["o_proj"]
        self.head_dim = config.head_dim  # how many heads there are the weights say: a mesh may have filled them up
        self.mesh: Mesh | None = None  # of more than one device; `loading` says

    def __call__(
        self, x: Float[Array, "B T D"], positions: Positions, cache: Cache | None = None, layer: ArrayLike = 0
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        batch, width, _ = x.shape
        with jax.named_scope("attention"):
            mesh = self.mesh if cache is None else None
            q, k, v = (by_heads(project(x), mesh) for project in (self.q_proj, self.k_proj, self.v_proj))
            q = rotate(q.reshape(batch, width, -1, self.head_dim), positions)
            k = rotate(k.reshape(batch, width, -1, self.head_dim), positions)
            v = v.reshape(k.shape)
            if cache is not None:
                mixed, cache = through_cache(q, k, v, cache, layer, positions.index, self.mesh)
                return self.o_proj(mixed), cache
            return self.o_proj(attend_rows(q, k, v, positions.segments, self.mesh)), cache


def through_cache(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache: Cache,
    layer: ArrayLike,
    index: Int[Array, "B T"],
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T NH"], Cache]:
    """`attend_cache` once keys and values are written into the slots ``index``. Over a ``mesh`` each device does both
    for its rows and heads, the tensor axis dividing them (`sharding.padded`): XLA cannot split a kernel by itself,
    and would send what is written in slots that differ by row to every device."""

    def own(q, k, v, cache, layer, index):
        cache = cache.written(layer, k, v, index)
        return attend_cache(q, cache, layer, index), cache

    if mesh is None:
        return own(q, k, v, cache, layer, index)
    parts, (batch, width, each, head_dim) = placement(cache, mesh), q.shape
    _, rows, _, heads = parts.k
    whole = tuple(name for name in row_axes(mesh, batch) if name != "fsdp")

    def few(x, *axes):
        """Whole over fsdp, if there are fewer tokens than a weight has rows: their sums travel more cheaply than the
        weights, which XLA would gather for a hidden state that is split as the cache is."""
        if batch * width >= each * head_dim:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(whole, None, *axes)))

    new = P(rows, None, heads, None)
    specs = new, new, new, parts, P(), P(rows, None)
    spread = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=(P(rows, None, heads), parts), check_vma=False)
    mixed, cache = spread(*(few(x, heads) for x in (q, k, v)), cache, jnp.asarray(layer), few(index))
    return few(mixed, heads), cache


def attend_cache(
    q: Float[Array, "B T N H"], cache: Cache, layer: ArrayLike, index: Int[Array, "B T"]
) -> Float[Array, "B T NH"]:
    """`attend` over the filled slots of one layer; T tokens in a row see the slots up to their own, ``index``.

    Compiled for a TPU this is a Pallas kernel, but in float16, which the kernels' compiler does not know.
    """

    def kernel(q, cache, layer, index):
        return cache_attention(q, cache, layer, index[:, 0])

    def one_by_one(q, cache, layer, index):
        return attend_blocks(q, cache, layer, index, jax.lax.map)

    tpu = attend_blocks if q.dtype == jnp.float16 else kernel
    layer = jnp.asarray(layer)
    return jax.lax.platform_dependent(q, cache, layer, index, tpu=tpu, cpu=one_by_one, default=attend_blocks)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Bool[Array, "#B T S"]
) -> Float[Array, "B T NH"]:
    """softmax(q k / sqrt(H)) v with scores and softmax in float32; head n reads key/value head n // G."""
    batch, width, heads, head_dim = q.shape
    # Turn the small operands, not the scores: with batch and head axes leading, no [T, S] array is ever transposed.
    q = q.reshape(batch, width, k.shape[2], -1, head_dim).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, S, H]
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, precision=highest, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bkgts,bksh->bkgth", weights, v, precision=highest)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, width, heads * head_dim)


def attend_rows(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T NH"]:
    """`attend` of whole rows to themselves: a token sees those of its segment up to itself.

    In bfloat16 compiled for a TPU this is a Pallas kernel, over the devices of a ``mesh`` as in `attend_cache`; in
    other dtypes XLA's form."""

    def spread(q, k, v, segments):
        assert mesh is not None
        rows = row_axes(mesh, len(q))
        whole, heads = P(rows), P(rows, None, "tensor" if "tensor" in mesh.shape else None)
        return jax.shard_map(
            causal_attention, mesh=mesh, in_specs=(heads, heads, heads, whole), out_specs=heads, check_vma=False
        )(q, k, v, segments)

    if q.dtype != jnp.bfloat16:
        return attend_parts(q, k, v, segments)
    tpu = causal_attention if mesh is None else spread
    return jax.lax.platform_dependent(q, k, v, segments, tpu=tpu, default=attend_parts)


def attend_parts(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
) -> Float[Array, "B T NH"]:
    """XLA's form of `attend_rows`. Of more than `BLOCK` tokens the scores are made for so many at a time, and made
    again in the backward pass: those of 4 rows of 2048 tokens and 36 heads are 2.4 GB, of which a backward pass without
    blocks holds two and a half."""
    batch, width, _, _ = q.shape
    blocks = -(-width // BLOCK)
    size = -(-width // blocks)

    def part(first, q, own):
        visible = (jnp.arange(width) <= first + jnp.arange(size)[:, None])[None]
        if segments is not None:
            visible = visible & (own[:, :, None] == segments[:, None, :])
        return attend(q, k, v, visible)

    if blocks == 1:
        return part(0, q, segments)

    def parts(x):  # along T, so that a batch that is spread over devices stays so
        x = jnp.pad(x, [(0, 0), (0, blocks * size - width)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, blocks, size, *x.shape[2:]), 1, 0)

    each = jnp.arange(blocks) * size, parts(q), None if segments is None else parts(segments)
    mixed = jax.lax.map(lambda x: jax.checkpoint(part)(*x), each)
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, blocks * size, -1)[:, :width]


def _at_once(part: Callable, given: Any) -> Array:
    return jax.vmap(part)(given)


def attend_blocks(
    q: Float[Array, "B T N H"],
    cache: Cache,
    layer: ArrayLike,
    index: Int[Array, "B T"],
    each: Callable[[Callable, Any], Array] = _at_once,
) -> Float[Array, "B T NH"]:
    """`attend` over the filled slots of a cache, a block of them at a time with a running softmax (arXiv 2205.14135):
    no [T, S] array is made. A token sees the slots up to its own, ``index``.

    The work is cut into rows and C of the K key/value heads of one row. One new token's query is zero in the lanes of
    the other heads, so that keys are multiplied as they lie: a product for each head, as of many tokens, turns them.
    ``each``: runs the parts. A CPU takes one after the other, whose keys and scores stay in its cache, up to a row's
    own end."""
    batch, width, heads, head_dim = q.shape
    kv_heads = cache.k.shape[3] // head_dim
    # Most prompts are shorter than a cache: of blocks as long as a piece the first is all that the first piece sees.
    block = min(BLOCK // 2 if width == 1 else max(width, BLOCK // 4), BLOCK, cache.slots)
    room = TOGETHER // head_dim if width == 1 else SCORES // (heads // kv_heads * width * block)
    together = max(c for c in range(1, max(1, room) + 1) if kv_heads % c == 0)
    wide, parts = width == 1, kv_heads // together
    lanes = together * head_dim if wide else head_dim
    # Of keys and values in float32 one token's products are made in it: they take less time than the rounding.
    dtype = cache.k.dtype if wide and cache.k.dtype == jnp.float32 else q.dtype
    own = jnp.eye(together, dtype=dtype)[:, None, None, :, None]
    exact: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    lowest = jnp.finfo(jnp.float32).min

    def part(given):
        q, row, head = given
        shape = (together * q.shape[1], width)  # of the queries: those of a head, then of a token
        queries = (q[..., None, :] * own).reshape(1, -1, lanes) if wide else q.reshape(together, -1, lanes)

        def step(i, carry):
            top, total, mixed = carry
            first = jnp.minimum(i * block, cache.slots - block)  # the last block may reach back into the one before
            # Without the barrier XLA:CPU makes a copy of the whole cache in float32 before the loop.
            held, slot = jax.lax.optimization_barrier((cache, first))
            like = jax.ShapeDtypeStruct((block, together, head_dim), dtype)
            k, v = (x.reshape(block, -1, lanes) for x in held.read(layer, row, slot, head, like))
            slots = first + jnp.arange(block)
            visible = (slots >= i * block) & (slots <= index[row][:, None])  # [T, S]
            if wide:  # scaled before they are turned: else XLA would turn the keys, and not what comes of them
                scores = (jnp.einsum("sch,crh->csr", k, queries, **exact) * head_dim**-0.5).swapaxes(1, 2)
            else:
                scores = jnp.einsum("crh,sch->crs", queries, k, **exact) * head_dim**-0.5
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
