"""Prefill and the decode loop, on the caches of `mlx_lm`.

Prompts of unequal length are padded on the left, as `BatchKVCache` requires. The graph of a step is built and
submitted while the step before it is computed, so the device never waits for Python.

Dims: B batch, T longest prompt, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, QuantizedKVCache, make_prompt_cache

from minicpm_data.generation.image_prompt import chunk_inputs, padded_inputs, penalized_ids
from minicpm_data.generation.options import IN_ANSWER, PLAIN_CACHE, CacheOptions, Sampling, count_tokens
from minicpm_data.generation.prompt_cache import CachedPrompt
from minicpm_data.generation.request import GenerationRequest
from minicpm_data.generation.thinking import Thoughts
from minicpm_mlx import device
from minicpm_mlx.generation.prompt_cache import restore, stored
from minicpm_mlx.generation.sampling import sample
from minicpm_mlx.layers.fused_linear import fuse
from minicpm_mlx.model import Model
from weights_io import memory
from weights_io.casting import group_of
from weights_io.errors import InputError
from weights_io.quantization.entries import GROUPS

ROOM = 1024  # tokens of an answer that must fit into memory before it begins
CLEAR_EVERY = 256  # tokens between clearings of MLX's buffer pool: the cache grows by this many at a time


@dataclass(frozen=True)
class State:
    """The decoding state of a batch between two steps."""

    cache: list[Any]  # one per layer, updated in place
    token: mx.array  # [B], the last sampled token, not yet in the cache
    token_counts: mx.array | None  # [B, V] from `count_tokens`, where rows are penalized
    rng: mx.array  # [B, 2] keys of mx.random


def make_cache(model: Model, padding: Sequence[int], cache_options: CacheOptions) -> list[Any]:
    """One cache per layer, for rows with the given left ``padding``. The options must have passed `check_kind`."""
    batch = len(padding) > 1
    if cache_options.kv_bits is not None and not cache_options.quantized_kv_start:
        return [QuantizedKVCache(group_size(model, cache_options), cache_options.kv_bits) for _ in model.layers]
    if not batch:
        return make_prompt_cache(model, cache_options.max_kv_size)
    if cache_options.max_kv_size is None:
        return [BatchKVCache(padding) for _ in model.layers]
    return [BatchRotatingKVCache(cache_options.max_kv_size, padding) for _ in model.layers]


def quantize_late(model: Model, cache: list[Any], cache_options: CacheOptions) -> None:
    """Quantize a cache, in place, once it holds ``quantized_kv_start`` tokens."""
    start, bits = cache_options.quantized_kv_start, cache_options.kv_bits
    if start and bits is not None and isinstance(cache[0], KVCache) and cache[0].offset >= start:
        cache[:] = [layer.to_quantized(group_size(model, cache_options), bits) for layer in cache]


def group_size(model: Model, cache_options: CacheOptions) -> int:
    """Group size of a quantized cache: the elements of a head that share a scale and a bias."""
    return cache_options.kv_group_size or group_of(_row_width(model))


def _row_width(model: Model) -> int:
    """The number that a group size of a quantized cache must divide: the width of a head, or of what is cached of
    latents and of rotary keys."""
    config = model.config
    return math.gcd(config.kv_lora_rank, config.qk_rope_head_dim) if config.is_latent else config.head_dim


def cache_bytes(model: Model, batch: int, length: int, cache_options: CacheOptions) -> int:
    """Bytes of a cache of ``batch`` rows and ``length`` positions (per device)."""
    dtype = model.model.norm.weight.dtype
    whole = memory.cache_bytes(model.config, batch * length, str(dtype).rpartition(".")[2])
    if cache_options.kv_bits is None or 0 < length <= cache_options.quantized_kv_start:
        return whole
    bits = cache_options.kv_bits + 2 * 8 * dtype.size / group_size(model, cache_options)
    return int(whole * bits / (8 * dtype.size))


def check_cache(model: Model, batch: int, length: int, cache_options: CacheOptions) -> None:
    """Raise `InputError` if a cache of ``batch`` rows and ``length`` positions does not fit into free memory."""
    needed = cache_bytes(model, batch, length, cache_options)
    memory.check_cache(batch, length, needed, device.free_memory(model))


def prefill_chunks(
    model: Model,
    ids: mx.array,
    cache: list[Any],
    pieces: int,
    length: int | mx.array,
    cache_options: CacheOptions = PLAIN_CACHE,
    features: mx.array | None = None,
) -> mx.array:
    """Run tokens [B, T], ``pieces`` at a time, through the cache. Returns the last token's hidden state [B, 1, D].
    ``length``: of the whole prompt, if these tokens end one. ``cache_options``: say when the cache is quantized.
    ``features``: [B, T, D] image tokens, as in `Decoder.embed`."""
    for start in range(0, ids.shape[1], pieces):
        now = slice(start, start + pieces)
        seen = None if features is None else features[:, now]
        hidden = model.decode(ids[:, now], cache, length, last=True, features=seen)
        quantize_late(model, cache, cache_options)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
    return hidden


def step(model: Model, state: State, sampling: Sampling) -> State:
    """Generate one more token per row."""
    hidden = model.decode(state.token[:, None], state.cache)
    return sample_next(state, model.head(hidden)[:, 0], sampling)


def sample_next(state: State, logits: mx.array, sampling: Sampling, forced: np.ndarray | None = None) -> State:
    """Sample the next token of each row from logits [B, V]. ``forced``: [B] ids to take in place of a sampled one, or
    -1."""
    rng, draws = state.rng, None
    if not sampling.greedy:
        both = mx.stack([mx.random.split(key) for key in state.rng])
        rng, draws = both[:, 0], both[:, 1]
    token = sample(logits, state.token_counts, sampling, draws)
    return with_token(replace(state, token=token, rng=rng), state.token_counts, forced)


def with_token(state: State, token_counts: mx.array | None, forced: np.ndarray | None = None) -> State:
    """The state with ``token_counts``, that of the state before, extended by its token, or by the ``forced`` one."""
    token = state.token
    if forced is not None and (forced >= 0).any():
        token = mx.where(mx.array(forced >= 0), mx.array(forced).astype(token.dtype), token)
    counts = None if token_counts is None else token_counts.at[mx.arange(len(token)), token].add(IN_ANSWER)
    mx.async_eval(token)
    return replace(state, token=token, token_counts=counts)


def check_kind(model: Model, batch: int, cache_options: CacheOptions) -> None:
    """Raise `InputError` for cache options that this backend does not support for this model and batch."""
    if cache_options.kv_bits is None:
        return
    if batch > 1:
        raise InputError("is for one prompt at a time in MLX; leave it out for a batch.", option="kv_bits")
    group, width = group_size(model, cache_options), _row_width(model)
    known = sorted(GROUPS["mlx"])
    if width % group or group not in known:
        groups = " or ".join(str(size) for size in known if width % size == 0)
        what = "the width of rotary keys and latents," if model.config.is_latent else "the head dimension"
        remedy = f"choose {groups}." if groups else "leave {kv_bits} out."
        wrong = (
            f"{group} does not divide {what} {width}" if width % group else f"is {group}, and MLX has no such groups"
        )
        raise InputError(f"{wrong}; {remedy}", "kv_group_size", ["kv_bits"])


def check(model: Model, request: GenerationRequest) -> None:
    """`minicpm_data.generation.api.Decoding.check`. Prompts and the beginning of the answer must fit into memory."""
    if request.constraint is not None:
        raise InputError("is for requests to an engine; leave it out.", option="constraint")
    if request.logprobs is not None:
        raise InputError("is for requests to an engine; leave it out.", option="logprobs")
    if request.adapter:
        raise InputError("is for requests to an engine; load the model with one adapter.", option="adapter")
    batch, kept = len(request.prompts), request.cache
    check_kind(model, batch, kept)
    length = request.longest + min(request.max_tokens, ROOM)
    check_cache(model, batch, min(length, kept.max_kv_size or length), kept)


def stream_tokens(model: Model, request: GenerationRequest) -> Iterator[np.ndarray]:
    """`minicpm_data.generation.api.Decoding.stream_tokens`."""
    max_tokens, sampling = request.max_tokens, request.sampling
    with wired_limit(model, [mx.default_stream(mx.default_device())]):
        thoughts = Thoughts(request.thinking, request.end_ids)
        state = prefill_and_sample(model, request)
        ends, finished = np.array(sorted(request.end_ids)), np.zeros(len(request.prompts), bool)
        for made in range(1, max_tokens + 1):
            following = step(model, state, sampling) if made < max_tokens else state
            quantize_late(model, following.cache, request.cache)
            tokens = np.asarray(state.token)
            thoughts.add(tokens)
            if (forced := thoughts.forced(1)) is not None:
                following = with_token(following, state.token_counts, forced[0])
            yield tokens
            finished |= np.isin(tokens, ends)
            if finished.all():
                return
            state = following
            if made % CLEAR_EVERY == 0:
                mx.clear_cache()


def prefill_and_sample(model: Model, request: GenerationRequest) -> State:
    """Prefill the prompts and sample each row's first token."""
    cache, hidden = prefill_prompts(model, request)
    prompts, sampling = request.prompts, request.sampling
    counted = [*map(penalized_ids, prompts)]
    token_counts = mx.array(count_tokens(counted, model.config.vocab_size)) if sampling.penalized else None
    last = mx.array([prompt[-1] for prompt in prompts])
    state = State(cache, last, token_counts, mx.array(sampling.row_keys(len(prompts))))
    forced = Thoughts(request.thinking).forced(1)
    return sample_next(state, model.head(hidden)[:, 0], sampling, None if forced is None else forced[0])


def prefill_prompts(model: Model, request: GenerationRequest) -> tuple[list[Any], mx.array]:
    """A cache that holds the prompts, and the hidden state [B, 1, D] of each prompt's last token."""
    fuse(model)
    prompts, width, options = request.prompts, request.longest, request.cache
    lengths = [len(prompt) for prompt in prompts]
    padding = [width - length for length in lengths]
    cache = make_cache(model, padding, options)
    if request.prefix is not None:
        cache = restore(model, cache, request.prefix)
        quantize_late(model, cache, options)
    begun = request.begun
    rows = [chunk_inputs(model, prompt, prompt, begun, len(prompt)) for prompt in prompts]
    ids, features = padded_inputs(rows, width - begun, left=True)
    given, seen = mx.array(ids), None if features is None else mx.array(features)
    length = width if len(prompts) == 1 else mx.array(lengths)
    return cache, prefill_chunks(model, given, cache, options.prefill_step_size, length, options, seen)


def cached_prompt(model: Model, request: GenerationRequest) -> CachedPrompt:
    """`minicpm_data.generation.api.Decoding.cached_prompt`."""
    with wired_limit(model, [mx.default_stream(mx.default_device())]):
        cache, _ = prefill_prompts(model, request)
        return stored(model.config, cache, len(request.prompt))
