"""Prompt caches on the cache of `kv_cache`: `minicpm_data.generation.prompt_cache` says what the file holds.

An 8-bit cache is written in MLX's format where the width of a head has groups of it, and whole otherwise. From a file
it is dequantized and quantized again, which gives the same codes.

Dims: L layers, K key/value heads, T tokens, S cache slots, H head dimension; of latents C and of rotary keys R.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minicpm_data.generation.prompt_cache import CachedPrompt, Part, Prefix, quantized
from minicpm_jax.layers.attention import over_mesh
from minicpm_jax.layers.kv_cache import Cache, LatentCache
from minicpm_jax.model import Model
from minicpm_jax.parallel.mesh import with_model_mesh
from minicpm_jax.parallel.processes import fetch
from weights_io.casting import group_of
from weights_io.config import ModelConfig

STEP = 256  # lengths are rounded up to a multiple of this, so that few programs write them


def stored(config: ModelConfig, cache: Cache, length: int) -> CachedPrompt:
    """The keys and values of the one prompt, of ``length`` tokens, that a cache holds."""
    width = math.gcd(config.kv_lora_rank, config.qk_rope_head_dim) if config.is_latent else config.head_dim
    group = group_of(width) if cache.k_scale is not None and width % group_of(width) == 0 else None

    @functools.lru_cache(1)  # a layer is asked for once for its keys and once for its values
    def layer(index: int) -> tuple[Part, Part]:
        keys, values = (np.ascontiguousarray(x[None, :, :length]) for x in _layer(config, cache, index))
        return (keys, values) if group is None else (quantized(keys, group), quantized(values, group))

    return CachedPrompt(length, config.num_hidden_layers, layer, None if group is None else 8, group)


def _layer(config: ModelConfig, cache: Cache, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of a layer, [K, S, H]; of an 8-bit cache in float32."""
    if isinstance(cache, LatentCache):
        return tuple(fetch(x)[None] for x in _latents(cache, index))  # type: ignore[return-value]

    def whole(held: Array, scale: Array | None) -> np.ndarray:
        heads = config.num_key_value_heads
        found = fetch(held[index, 0]).reshape(cache.slots, -1, config.head_dim)
        if scale is not None:  # each device of tensor has padded the rows of its heads
            parts = 1 if cache_mesh is None else cache_mesh.shape.get("tensor", 1)
            of_heads = fetch(scale[index, 0]).reshape(parts, -1, cache.slots)[:, : found.shape[1] // parts]
            found = found.astype(np.float32) * of_heads.reshape(found.shape[1], -1).T[..., None]
        return found[:, :heads].transpose(1, 0, 2)

    cache_mesh = getattr(cache.k.sharding, "mesh", None)
    return whole(cache.k, cache.k_scale), whole(cache.v, cache.v_scale)


@jax.jit
def _latents(cache: LatentCache, index: Int[Array, ""]) -> tuple[Float[Array, "S C"], Float[Array, "S R"]]:
    return cache.read(index, 0, 0, cache.slots, cache.k.dtype if cache.k_scale is None else jnp.float32)


def restore(model: Model, cache: Cache, prefix: Prefix) -> Cache:
    """Fill an empty cache of one row with the beginning of a prompt.

    Arguments:
        model: the model.
        cache: the cache, which must not be used afterwards.
        prefix: the beginning, of T tokens. The zeros after it are overwritten by later tokens.
    """
    config, width = model.config, min(-(-prefix.length // STEP) * STEP, cache.slots)
    heads = 1 if config.is_latent else cache.heads(config.head_dim)
    for index in range(config.num_hidden_layers):
        parts: list[Any] = []
        for part in prefix.floats(index):
            more = [(0, 0), (0, heads - part.shape[1]), (0, width - prefix.length), (0, 0)]
            parts.append(np.pad(part, more).transpose(0, 2, 1, 3))  # [1, T, K, H]
        cache = _write(model, cache, np.int32(index), *parts)
    return dataclasses.replace(cache, lengths=jnp.full_like(cache.lengths, prefix.length))


@functools.partial(jax.jit, donate_argnames="cache")
@with_model_mesh
def _write(
    model: Model, cache: Cache, layer: Int[Array, ""], k: Float[Array, "1 T K H"], v: Float[Array, "1 T K H"]
) -> Cache:
    index = jnp.arange(k.shape[1])[None]
    if isinstance(cache, LatentCache):
        return cache.update(layer, k[:, :, 0], v[:, :, 0], index)

    def own(k, v, cache, layer, index):
        return v.reshape(*v.shape[:2], -1), cache.update(layer, k, v, index)

    return over_mesh(own, (k, v), (), (), cache, layer, index)[1]
