"""Multi-head latent attention (arXiv 2405.04434) as MiniCPM3 has it.

Dims as in model.py: B batch, T new tokens, S cache slots, D hidden, N heads, C latent of keys and values, R rotary key,
      E = width of a key's part without RoPE, H value width.

The cache holds the latent and the one rotary key of a token (`kv_cache.LatentCache`), in place of each head's key and
value. A few tokens attend in the absorbed form: the key half of ``kv_b_proj`` is applied to the query, and its value
half to the weighted sum of the latents, so that nothing is computed per cache slot and head. For more tokens the keys
and values of all heads are expanded from the latents, a block of slots at a time.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from minicpm_jax.layers.attention import over_mesh, self_attention
from minicpm_jax.layers.blockwise import blockwise_attention, blockwise_attention_in_turn
from minicpm_jax.layers.kernels.latent_attention import latent_attention
from minicpm_jax.layers.kernels.latent_attention import runs as latent_attention_runs
from minicpm_jax.layers.kernels.latent_prefill import latent_prefill
from minicpm_jax.layers.kernels.latent_prefill import runs as latent_prefill_runs
from minicpm_jax.layers.kernels.paged_latent import paged_latent_attention, paged_latent_prefill
from minicpm_jax.layers.kernels.precision import precision
from minicpm_jax.layers.kv_cache import Cache, LatentCache, rows_over_tensor
from minicpm_jax.layers.linear import Linear, RMSNorm
from minicpm_jax.layers.lora import effective_weight
from minicpm_jax.layers.rope import Positions, apply_rope
from minicpm_jax.parallel.activations import shard_heads
from minicpm_jax.parallel.mesh import ambient_mesh
from weights_io.config import ModelConfig

ABSORBED = 64  # most new tokens in the absorbed form; in MiniCPM3-4B it has fewer products for up to 85 tokens


class LatentNorm(RMSNorm):
    """The norm of a latent. Its eps is 1e-6, whatever rms_norm_eps is."""

    def __init__(self, weight: Float[Array, "C"]):
        super().__init__(weight, 1e-6)


class LatentAttention(nnx.Module):
    """Projections to latents and from them, RoPE, attention (over the cache, if there is one), output projection."""

    def __init__(self, weights: dict[str, Any], config: ModelConfig):
        self.q_a_proj, self.q_b_proj = Linear(weights["q_a_proj"]["weight"]), Linear(weights["q_b_proj"]["weight"])
        self.kv_a_proj_with_mqa = Linear(weights["kv_a_proj_with_mqa"]["weight"])
        self.kv_b_proj, self.o_proj = Linear(weights["kv_b_proj"]["weight"]), Linear(weights["o_proj"]["weight"])
        self.q_a_layernorm = LatentNorm(weights["q_a_layernorm"]["weight"])
        self.kv_a_layernorm = LatentNorm(weights["kv_a_layernorm"]["weight"])
        # The head count comes from the weights: a mesh may have padded it.
        self.rank, self.nope_dim = config.kv_lora_rank, config.qk_nope_head_dim
        self.key_dim, self.value_dim = config.qk_nope_head_dim + config.qk_rope_head_dim, config.head_dim

    def __call__(
        self, x: Float[Array, "B T D"], positions: Positions, cache: Cache | None = None, layer: ArrayLike = 0
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        batch, width, _ = x.shape
        with jax.named_scope("attention"):
            q = shard_heads(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))), cache)
            q = q.reshape(batch, width, -1, self.key_dim)
            nope, rope = q[..., : self.nope_dim], apply_rope(q[..., self.nope_dim :], positions)
            joint = self.kv_a_proj_with_mqa(x)
            latent = self.kv_a_layernorm(joint[..., : self.rank])
            rope_key = apply_rope(joint[..., None, self.rank :], positions)[..., 0, :]
            if cache is not None:
                mixed, cache = self.cached(nope, rope, latent, rope_key, cache, layer, positions.index)
                return self.o_proj(mixed), cache
            both = shard_heads(self.kv_b_proj(latent)).reshape(batch, width, -1, self.nope_dim + self.value_dim)
            k, v = keys_and_values(both, rope_key, self.nope_dim)
            return self.o_proj(self_attention(jnp.concatenate([nope, rope], axis=-1), k, v, positions.segments)), cache

    def cached(
        self,
        nope: Float[Array, "B T N E"],
        rope: Float[Array, "B T N R"],
        latent: Float[Array, "B T C"],
        rope_key: Float[Array, "B T R"],
        cache: Cache,
        layer: ArrayLike,
        index: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T NH"], Cache]:
        """Write latents and rotary keys into the cache slots ``index``, then attend to the filled ones. Over a mesh
        each device of tensor handles its heads. It holds the cache of its share of the rows, whose queries of all heads
        it gets from the others; or of all rows, if tensor does not divide them."""
        weight = effective_weight(self.kv_b_proj, nope.dtype).reshape(-1, self.nope_dim + self.value_dim, self.rank)

        exchange = Exchange(rows_over_tensor(cache, ambient_mesh()))

        def own(nope, rope, latent, rope_key, weight, cache, layer, index):
            cache = cache.update(layer, latent, rope_key, index)
            form = absorbed if index.shape[1] <= ABSORBED else expanded
            return form(nope, rope, weight, cache, layer, index, exchange), cache

        return over_mesh(own, (nope, rope), (latent, rope_key), (weight,), cache, layer, index)


def keys_and_values(
    both: Float[Array, "... N E+H"], rope_key: Float[Array, "... R"], nope_dim: int
) -> tuple[Float[Array, "... N E+R"], Float[Array, "... N H"]]:
    """The keys and values of all heads, from the output of ``kv_b_proj`` and the rotary key that the heads share."""
    shared = jnp.broadcast_to(rope_key[..., None, :], (*both.shape[:-1], rope_key.shape[-1]))
    return jnp.concatenate([both[..., :nope_dim], shared], axis=-1), both[..., nope_dim:]


@dataclass(frozen=True)
class Exchange:
    """What the devices of tensor send each other where each one holds the cache of some rows (``split``)."""

    split: bool = False

    def to_rows(self, x: Float[Array, "B T N _"]) -> Float[Array, "B T N _"]:
        """From some heads of all rows to all heads of some rows."""
        return jax.lax.all_to_all(x, "tensor", 0, 2, tiled=True) if self.split else x

    def to_heads(self, x: Float[Array, "B T N _"]) -> Float[Array, "B T N _"]:
        """And back."""
        return jax.lax.all_to_all(x, "tensor", 2, 0, tiled=True) if self.split else x

    def all_heads(self, weight: Float[Array, "N _ _"]) -> Float[Array, "N _ _"]:
        return jax.lax.all_gather(weight, "tensor", tiled=True) if self.split else weight


def absorbed(
    nope: Float[Array, "B T N E"],
    rope: Float[Array, "B T N R"],
    weight: Float[Array, "N E+H C"],
    cache: LatentCache,
    layer: ArrayLike,
    index: Int[Array, "B T"],
    exchange: Exchange,
) -> Float[Array, "B T NH"]:
    """Attention over the filled slots of one layer's latents, which are keys and values of all heads at once. A token
    sees the slots up to its own, ``index``. On a TPU this is a Pallas kernel."""
    batch, width, _, nope_dim = nope.shape
    rank, exact = weight.shape[2], precision(nope)
    scale = (nope_dim + rope.shape[-1]) ** -0.5
    q = jnp.einsum("btne,nec->btnc", nope, weight[:, :nope_dim], precision=exact)
    q, rope = exchange.to_rows(q), exchange.to_rows(rope)

    def kernel(q, rope, cache, layer, index):
        attention = paged_latent_attention if cache.paged else latent_attention
        return attention(q, rope, cache, layer, index[:, 0], scale)

    def blocks(attention, q, rope, cache, layer, index):
        mixed = attention(jnp.concatenate([q, rope], axis=-1), cache, layer, index, scale=scale)
        return mixed.reshape(*q.shape[:3], -1)[..., :rank]  # the sum of the rotary keys is not used

    given = q, rope, cache, jnp.asarray(layer), index
    mixed = exchange.to_heads(_on_platform(kernel if latent_attention_runs(q, rope) else None, blocks, given))
    return jnp.einsum("btnc,nhc->btnh", mixed, weight[:, nope_dim:], precision=exact).reshape(batch, width, -1)


def expanded(
    nope: Float[Array, "B T N E"],
    rope: Float[Array, "B T N R"],
    weight: Float[Array, "N E+H C"],
    cache: LatentCache,
    layer: ArrayLike,
    index: Int[Array, "B T"],
    exchange: Exchange,
) -> Float[Array, "B T NH"]:
    """`absorbed` with the keys and values of each head, which have fewer dimensions than a latent. On a TPU
    this is a Pallas kernel."""
    batch, width, _, nope_dim = nope.shape
    key_dim, value_dim = nope_dim + rope.shape[-1], weight.shape[1] - nope_dim
    nope, rope, weight = exchange.to_rows(nope), exchange.to_rows(rope), exchange.all_heads(weight)

    def kernel(nope, rope, weight, cache, layer, index):
        attention = paged_latent_prefill if cache.paged else latent_prefill
        return attention(nope, rope, weight, cache, layer, index[:, 0])

    def blocks(attention, nope, rope, weight, cache, layer, index):
        q = _padded(jnp.concatenate([nope, rope], axis=-1), max(key_dim, value_dim))
        mixed = attention(q, ExpandedCache(cache, weight, nope_dim), layer, index, scale=key_dim**-0.5)
        return mixed.reshape(*q.shape[:3], -1)[..., :value_dim]

    given = nope, rope, weight, cache, jnp.asarray(layer), index
    mixed = _on_platform(kernel if latent_prefill_runs(nope, rope, weight) else None, blocks, given)
    return exchange.to_heads(mixed).reshape(batch, width, -1)


def _on_platform(kernel: Callable[..., Array] | None, blocks: Callable[..., Array], given: tuple[Any, ...]) -> Array:
    """``kernel(*given)`` on a TPU, where there is one for these shapes; ``blocks(attention, *given)`` elsewhere."""
    forms: dict[str, Any] = {"cpu": functools.partial(blocks, blockwise_attention_in_turn)}
    if kernel is not None:
        forms["tpu"] = kernel
    return jax.lax.platform_dependent(*given, **forms, default=functools.partial(blocks, blockwise_attention))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["cache", "weight"], meta_fields=["nope_dim"])
@dataclass(frozen=True)
class ExpandedCache:
    """A latent cache as `blockwise_attention` reads one with keys and values of ``weight``'s heads, computed block by
    block. The narrower of keys and values is padded to the width of the other."""

    cache: LatentCache
    weight: Float[Array, "N E+H C"]
    nope_dim: int

    @property
    def k(self) -> Array:
        return self.cache.k

    @property
    def slots(self) -> int:
        return self.cache.slots

    @property
    def grain(self) -> int:
        return self.cache.grain

    def heads(self, head_dim: int) -> int:
        return self.weight.shape[0]

    def read_block(
        self, layer: ArrayLike, row: ArrayLike, slot: ArrayLike, head: ArrayLike, like: Float[Array, "S N X"]
    ) -> tuple[Array, Array]:
        """`Cache.read_block`."""
        size, heads, width = like.shape
        latent, rope_key = self.cache.read(layer, row, slot, size, like.dtype)
        weight = jax.lax.dynamic_slice_in_dim(self.weight, head, heads).astype(like.dtype)
        both = jnp.einsum("sc,nfc->snf", latent, weight, precision=precision(latent))
        k, v = keys_and_values(both, rope_key, self.nope_dim)
        return _padded(k, width), _padded(v, width)


def _padded(x: Array, width: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
