"""Prefill and the decode loop, on the caches of `mlx_lm`.

Prompts of unequal length are padded on the left, as `BatchKVCache` has it. The graph of a step is built and handed over
while the step before it is computed, so a token costs the device no pause.
Dims: B batch, T longest prompt, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, QuantizedKVCache, make_prompt_cache

from minicpm_data.generation.options import CacheOptions, Sampling, seen_tokens
from minicpm_data.generation.request import GenerationRequest
from minicpm_mlx import device
from minicpm_mlx.generation.sampling import sample
from minicpm_mlx.layers.fused_linear import join
from minicpm_mlx.model import Model
from weights_io import memory
from weights_io.casting import group_of
from weights_io.errors import InputError

ROOM = 1024  # tokens of an answer for which there must be room before it begins
CLEAR_EVERY = 256  # tokens after which MLX's pool of freed buffers is emptied, as the cache grows by that much


@dataclass(frozen=True)
class State:
    """Where the rows of a batch stand between two steps."""

    cache: list[Any]  # one for each layer, written in place
    token: mx.array  # [B], the last one chosen, not yet in the cache
    seen: mx.array | None  # [B, V] bool, for the repetition penalty
    keys: mx.array  # [B, 2] of mx.random


def make_cache(model: Model, padding: Sequence[int], cache_options: CacheOptions) -> list[Any]:
    """A cache for each layer and rows with so much padding on the left, of a kind that `check_kind` has passed."""
    batch = len(padding) > 1
    if cache_options.kv_bits is not None:
        return [QuantizedKVCache(group_size(model, cache_options), cache_options.kv_bits) for _ in model.layers]
    if not batch:
        return make_prompt_cache(model, cache_options.max_kv_size)
    if cache_options.max_kv_size is None:
        return [BatchKVCache(padding) for _ in model.layers]
    return [BatchRotatingKVCache(cache_options.max_kv_size, padding) for _ in model.layers]


def group_size(model: Model, cache_options: CacheOptions) -> int:
    """Numbers of a head that share a scale and an offset in a cache of few bits."""
    return cache_options.kv_group_size or group_of(model.config.head_dim)


def cache_bytes(model: Model, batch: int, length: int, cache_options: CacheOptions) -> int:
    """Of the cache of so many rows and positions."""
    dtype = model.model.norm.weight.dtype
    whole = memory.cache_bytes(model.config, batch * length, str(dtype).rpartition(".")[2])
    if cache_options.kv_bits is None:
        return whole
    bits = cache_options.kv_bits + 2 * 8 * dtype.size / group_size(model, cache_options)
    return int(whole * bits / (8 * dtype.size))


def check_cache(model: Model, batch: int, length: int, cache_options: CacheOptions) -> None:
    """`InputError` where there is no room for a cache of so many rows and positions."""
    needed = cache_bytes(model, batch, length, cache_options)
    memory.check_cache(batch, length, needed, device.free_memory(model))


def run(model: Model, ids: mx.array, cache: list[Any], pieces: int, length: int | mx.array) -> mx.array:
    """The last hidden state [B, 1, D] of tokens [B, T], or of those that end a prompt of ``length``."""
    for start in range(0, ids.shape[1], pieces):
        hidden = model.decode(ids[:, start : start + pieces], cache, length, last=True)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
    return hidden


def step(model: Model, state: State, sampling: Sampling) -> State:
    """One more token for each row."""
    hidden = model.decode(state.token[:, None], state.cache)
    return chosen(state, model.head(hidden)[:, 0], sampling)


def chosen(state: State, logits: mx.array, sampling: Sampling) -> State:
    """The state with the next token of each row, from logits [B, V]."""
    keys, draws = state.keys, None
    if not sampling.greedy:
        both = mx.stack([mx.random.split(key) for key in state.keys])
        keys, draws = both[:, 0], both[:, 1]
    token = sample(logits, state.seen, sampling, draws)
    seen = None if state.seen is None else mx.put_along_axis(state.seen, token[:, None], mx.array(True), axis=1)
    mx.async_eval(token)
    return replace(state, token=token, seen=seen, keys=keys)


def check_kind(model: Model, batch: int, cache_options: CacheOptions) -> None:
    """`InputError` for a kind of cache that is not here for that model and so many rows."""
    if cache_options.kv_bits is None:
        return
    if batch > 1:
        raise InputError("is for one prompt at a time in MLX; leave it out for a batch.", option="kv_bits")
    group, width = group_size(model, cache_options), model.config.head_dim
    if width % group:
        groups = " or ".join(str(size) for size in (32, 64, 128) if width % size == 0)
        remedy = f"choose {groups}." if groups else "leave {kv_bits} out."
        raise InputError(f"{group} does not divide the head dimension {width}; {remedy}", "kv_group_size", ["kv_bits"])


def check(model: Model, request: GenerationRequest) -> None:
    """`minicpm_data.generation.api.Decoding.check`: room for the prompts and the beginning of an answer too."""
    batch, kept = len(request.prompts), request.cache
    check_kind(model, batch, kept)
    length = request.longest + min(request.max_tokens, ROOM)
    check_cache(model, batch, min(length, kept.max_kv_size or length), kept)


def stream_tokens(model: Model, request: GenerationRequest) -> Iterator[np.ndarray]:
    """`minicpm_data.generation.api.Decoding.stream_tokens`."""
    max_tokens, sampling = request.max_tokens, request.sampling
    with wired_limit(model, [mx.default_stream(mx.default_device())]):
        state = started(model, request)
        ends, done = np.array(sorted(request.end_ids)), np.zeros(len(request.prompts), bool)
        for made in range(1, max_tokens + 1):
            following = step(model, state, sampling) if made < max_tokens else state
            tokens = np.asarray(state.token)
            yield tokens
            done |= np.isin(tokens, ends)
            if done.all():
                return
            state = following
            if made % CLEAR_EVERY == 0:
                mx.clear_cache()


def started(model: Model, request: GenerationRequest) -> State:
    """Each prompt run, and its row's first token chosen."""
    join(model)
    prompts, sampling, width = request.prompts, request.sampling, request.longest
    lengths = [len(prompt) for prompt in prompts]
    padding = [width - length for length in lengths]
    cache = make_cache(model, padding, request.cache)
    ids = mx.array([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    length = width if len(prompts) == 1 else mx.array(lengths)
    hidden = run(model, ids, cache, request.cache.prefill_step_size, length)
    seen = mx.array(seen_tokens(prompts, model.config.vocab_size)) if sampling.penalised else None
    state = State(cache, ids[:, -1], seen, mx.array(sampling.row_keys(len(prompts))))
    return chosen(state, model.head(hidden)[:, 0], sampling)
