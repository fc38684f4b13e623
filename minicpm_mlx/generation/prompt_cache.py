"""Prompt caches on the caches of `mlx_lm`: `minicpm_data.generation.prompt_cache` says what the file holds."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import QuantizedKVCache

from minicpm_data.generation.prompt_cache import CachedPrompt, Part, Prefix
from minicpm_mlx.model import Model
from weights_io.config import ModelConfig


def stored(config: ModelConfig, cache: Sequence[Any], length: int) -> CachedPrompt:
    """The keys and values of the one prompt, of ``length`` tokens, that a cache holds. A rotating one must not have
    begun to rotate."""

    def part(held: Any) -> Part:
        if isinstance(held, mx.array):
            return _as_numpy(held[:, :, :length])
        words, scales, biases = (_as_numpy(x[:, :, :length]) for x in held)
        return words, scales, biases

    def layer(index: int) -> tuple[Part, Part]:
        return part(cache[index].keys), part(cache[index].values)

    if isinstance(cache[0], QuantizedKVCache):
        return CachedPrompt(length, config.num_hidden_layers, layer, cache[0].bits, cache[0].group_size)
    return CachedPrompt(length, config.num_hidden_layers, layer)


def restore(model: Model, cache: list[Any], prefix: Prefix) -> list[Any]:
    """Fill an empty cache with the beginning of a prompt.

    Arguments:
        model: the model.
        cache: one cache per layer, which must not be used afterwards.
        prefix: the beginning. The cache of a quantized file is quantized.
    """
    dtype = model.model.norm.weight.dtype
    for index in range(len(cache)):
        keys, values = prefix.layer(index)
        if isinstance(keys, tuple):
            own = QuantizedKVCache(prefix.group_size, prefix.bits)
            own.keys, own.values = ([_as_mlx(x, dtype) for x in part] for part in (keys, values))
            own.offset = prefix.length
            cache[index] = own
        else:
            cache[index].update_and_fetch(_as_mlx(keys, dtype), _as_mlx(values, dtype))
        mx.eval(cache[index].state)
    return cache


def _as_numpy(array: mx.array) -> np.ndarray:
    """numpy does not know bfloat16: it is passed as bits."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def _as_mlx(data: Any, dtype: mx.Dtype) -> mx.array:
    """Codes as they are, and floats in ``dtype``."""
    data = np.ascontiguousarray(data)
    if data.dtype == np.uint32:
        return mx.array(data)
    if data.dtype == ml_dtypes.bfloat16:
        return mx.array(data.view(np.uint16)).view(mx.bfloat16).astype(dtype)
    return mx.array(data).astype(dtype)
