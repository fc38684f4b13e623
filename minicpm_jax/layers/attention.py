"""Causal self-attention with rotary positions and a key/value cache.

Dims as in model.py: B batch, T new tokens, S cache slots, N query heads, K key/value heads, G = N / K,
      H head dimension.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from minicpm_jax.layers.blockwise import BLOCK, blockwise_attention, blockwise_attention_in_turn
from minicpm_jax.layers.kernels.cache_attention import cache_attention
from minicpm_jax.layers.kernels.causal_attention import causal_attention
from minicpm_jax.layers.kernels.paged_attention import paged_attention
from minicpm_jax.layers.kv_cache import Cache, cache_specs
from minicpm_jax.layers.rope import Positions, apply_rope
from minicpm_jax.parallel.activations import shard_heads
from minicpm_jax.parallel.mesh import ambient_mesh, row_axes
from weights_io.config import ModelConfig


class Attention(nnx.Module):
    """Projections, RoPE, attention (over the cache, if there is one) and the output projection."""

    def __init__(self, projections: dict[str, nnx.Module], config: ModelConfig):
        self.q_proj, self.k_proj = projections["q_proj"], projections["k_proj"]
        self.v_proj, self.o_proj = projections["v_proj"], projections["o_proj"]
        self.head_dim = config.head_dim  # the head count comes from the weights: a mesh may have padded it

    def __call__(
        self, x: Float[Array, "B T D"], positions: Positions, cache: Cache | None = None, layer: ArrayLike = 0
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        batch, width, _ = x.shape
        with jax.named_scope("attention"):
            q, k, v = (shard_heads(project(x), cache) for project in (self.q_proj, self.k_proj, self.v_proj))
            q = apply_rope(q.reshape(batch, width, -1, self.head_dim), positions)
            k = apply_rope(k.reshape(batch, width, -1, self.head_dim), positions)
            v = v.reshape(k.shape)
            if cache is not None:
                mixed, cache = cached_attention(q, k, v, cache, layer, positions.index)
                return self.o_proj(mixed), cache
            return self.o_proj(self_attention(q, k, v, positions.segments)), cache


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache: Cache,
    layer: ArrayLike,
    index: Int[Array, "B T"],
) -> tuple[Float[Array, "B T NH"], Cache]:
    """Write keys and values into the cache slots ``index``, then `attend_cache`.

    Over a mesh this is a `shard_map`: each device handles its rows and heads, and tensor divides the heads
    (`sharding.pad_config`). XLA cannot partition a Pallas kernel by itself, and would send updates whose slots
    differ by row to every device.
    """

    def own(q, k, v, cache, layer, index):
        cache = cache.update(layer, k, v, index)
        return attend_cache(q, cache, layer, index), cache

    return over_mesh(own, (q, k, v), (), (), cache, layer, index)


def over_mesh(
    own: Callable[..., tuple[Array, Cache]],
    by_head: tuple[Float[Array, "B T _ _"], ...],
    shared: tuple[Float[Array, "B T _"], ...],
    weights: tuple[Float[Array, "N _ _"], ...],
    cache: Cache,
    layer: ArrayLike,
    index: Int[Array, "B T"],
) -> tuple[Float[Array, "B T NH"], Cache]:
    """``own(*by_head, *shared, *weights, cache, layer, index)`` on each device with its rows and heads. The
    rows of ``shared``, ``cache`` and ``index`` are those of the cache, which `cache_specs` may divide over tensor."""
    mesh = ambient_mesh()
    if mesh is None:
        return own(*by_head, *shared, *weights, cache, layer, index)
    parts, (batch, width, each, head_dim) = cache_specs(cache, mesh), by_head[0].shape
    rows, heads = parts.k[1], "tensor" if "tensor" in mesh.shape else None
    outer = cache.row_axes(mesh, batch) or None
    whole = tuple(name for name in cache.row_axes(mesh, batch) if name != "fsdp")

    def few(x, *axes):
        """Replicate over fsdp if there are fewer tokens than rows in a weight. Summing these activations moves fewer
        bytes than gathering the weights, which XLA does if the hidden state is sharded like the cache."""
        if batch * width >= each * head_dim:
            return x
        return jax.lax.with_sharding_constraint(x, P(whole, None, *axes))

    specs = *([P(outer, None, heads, None)] * len(by_head)), *([P(rows)] * len(shared)), *([P(heads)] * len(weights))
    specs = *specs, parts, P(), P(rows, None)
    sharded = jax.shard_map(own, in_specs=specs, out_specs=(P(outer, None, heads), parts), check_vma=False)
    given = *(few(x, heads) for x in by_head), *map(few, shared), *weights
    mixed, cache = sharded(*given, cache, jnp.asarray(layer), few(index))
    return few(mixed, heads), cache


def attend_cache(
    q: Float[Array, "B T N H"], cache: Cache, layer: ArrayLike, index: Int[Array, "B T"]
) -> Float[Array, "B T NH"]:
    """`attend` over the filled slots of one layer's cache. A token sees the slots up to its own, ``index``.

    On a TPU this is a Pallas kernel, except in float16, which Mosaic does not support.
    """

    def kernel(q, cache, layer, index):
        attention = paged_attention if cache.paged else cache_attention
        return attention(q, cache, layer, index[:, 0])

    forms = {"tpu": blockwise_attention if q.dtype == jnp.float16 else kernel, "cpu": blockwise_attention_in_turn}
    return jax.lax.platform_dependent(q, cache, jnp.asarray(layer), index, **forms, default=blockwise_attention)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Bool[Array, "#B T S"]
) -> Float[Array, "B T NH"]:
    """softmax(q k / sqrt(H)) v, with scores and softmax in float32. Query head n reads key/value head n // G. The
    values may have another width than the keys."""
    batch, width, heads, head_dim = q.shape
    # Transpose the small operands, not the scores: with batch and head axes leading, no [T, S] array is transposed.
    q = q.reshape(batch, width, k.shape[2], -1, head_dim).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, S, H]
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, precision=highest, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bkgts,bksh->bkgth", weights, v, precision=highest)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, width, heads * v.shape[-1])


def self_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T NH"]:
    """`attend` of whole rows without a cache: a token attends to the tokens of its segment up to itself.

    In bfloat16 on a TPU this is a Pallas kernel, sharded over a mesh as in `cached_attention`. Other dtypes use
    `chunked_attention`."""
    mesh = ambient_mesh()

    def sharded(q, k, v, segments):
        assert mesh is not None
        rows = row_axes(mesh, len(q))
        whole, heads = P(rows), P(rows, None, "tensor" if "tensor" in mesh.shape else None)
        specs = heads, heads, heads, whole
        return jax.shard_map(causal_attention, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, segments)

    if q.dtype != jnp.bfloat16:
        return chunked_attention(q, k, v, segments)
    tpu = causal_attention if mesh is None else sharded
    return jax.lax.platform_dependent(q, k, v, segments, tpu=tpu, default=chunked_attention)


def chunked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
) -> Float[Array, "B T NH"]:
    """`self_attention` in plain XLA. With more than `BLOCK` tokens the scores are computed for one block of queries at
    a time and recomputed in the backward pass. Unblocked, the scores of 4 rows of 2048 tokens and 36 heads take 2.4
    GB, and the backward pass holds two and a half such arrays."""
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

    def parts(x):  # split along T: a batch sharded over devices stays sharded
        x = jnp.pad(x, [(0, 0), (0, blocks * size - width)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, blocks, size, *x.shape[2:]), 1, 0)

    each = jnp.arange(blocks) * size, parts(q), None if segments is None else parts(segments)
    mixed = jax.lax.map(lambda x: jax.checkpoint(part)(*x), each)
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, blocks * size, -1)[:, :width]
