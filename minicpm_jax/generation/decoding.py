"""Prefill and the decode loop, compiled once for each prompt bucket and cache length.

Prompts are padded on the right to one of a few bucket lengths, and long prompts run chunk by chunk, so that a few
programs serve all prompts. Decoding runs many steps in one call (a `while_loop` on the device), so a token costs
neither a dispatch nor a transfer of its own.

Dims: B batch, T prompt bucket, S cache slots, V vocabulary.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jaxtyping import Array, Bool, Float, Int, UInt32

from minicpm_data.generation.image_prompt import chunk_inputs, padded_inputs, penalized_ids
from minicpm_data.generation.options import IN_ANSWER, CacheOptions, count_tokens
from minicpm_data.generation.prompt_cache import CachedPrompt
from minicpm_data.generation.request import GenerationRequest
from minicpm_data.generation.thinking import Thoughts
from minicpm_jax import device
from minicpm_jax.cpu.form import form_of_model
from minicpm_jax.generation.prompt_cache import restore, stored
from minicpm_jax.generation.sampling import SamplingParams, Scores, no_scores, only_allowed, sample, score
from minicpm_jax.layers.kv_cache import Cache, cache_specs
from minicpm_jax.layers.row_lora import adapter_rows
from minicpm_jax.model import Model
from minicpm_jax.parallel.processes import broadcast_from_main, fetch
from weights_io import memory
from weights_io.config import ModelConfig
from weights_io.errors import InputError

STEPS = 32  # most tokens per call of the decode loop
PATIENCE = 0.1  # most seconds between two pieces of streamed text
ROOM = 1024  # cache slots reserved for an answer; a longer answer grows the cache


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "token", "token_counts", "rng", "finished", "eos_ids", "scores"],
    meta_fields=[],
)
@dataclass(frozen=True)
class State:
    """The decoding state of a batch between two calls."""

    cache: Cache
    token: Int[Array, "B"]  # the last sampled token, not yet in the cache
    token_counts: Int[Array, "B V"] | None  # from `count_tokens`, where rows are penalized
    rng: Array  # [B] keys of jax.random
    finished: Bool[Array, "B"]
    eos_ids: Int[Array, "E"] | Int[Array, "B E"]
    scores: Scores | None = None  # of ``token``, where `SamplingParams.scored` is given


@functools.partial(jax.jit, static_argnames=("batch", "slots", "bits"))
def empty(model: Model, batch: int, slots: int, bits: int | None) -> tuple[Cache, Float[Array, "B 1 D"]]:
    """An empty cache, and zeros in place of each row's last hidden state."""
    dtype, mesh = model.model.norm.weight.dtype, model.mesh
    cache = Cache.empty(model.config, batch, slots, form_of_model(model).cache_dtype(model), bits, mesh)
    if mesh is not None:  # otherwise each device would hold the whole cache
        specs = cache_specs(cache, mesh)
        where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        cache = jax.lax.with_sharding_constraint(cache, where)
    return cache, jnp.zeros((batch, 1, model.config.hidden_size), dtype)


def cache_bytes(model: Model, batch: int, length: int, cache_options: CacheOptions) -> int:
    """Bytes of a cache of ``batch`` rows and ``length`` positions (per device)."""
    dtype = form_of_model(model).cache_dtype(model)
    return _cache_bytes(model.config, batch, length, dtype, cache_options.kv_bits, model.mesh)


@functools.lru_cache  # tracing takes 2 ms, as long as the head of MiniCPM-1B
def _cache_bytes(config: ModelConfig, batch: int, slots: int, dtype: Any, bits: int | None, mesh: Mesh | None) -> int:
    cache = jax.eval_shape(lambda: Cache.empty(config, batch, slots, dtype, bits, mesh))
    specs = cache_specs(cache, mesh) if mesh is not None else cache

    def bytes_of(x, spec):
        shape = x.shape if mesh is None else NamedSharding(mesh, spec).shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(bytes_of, cache, specs)))


def check_cache(model: Model, batch: int, length: int, cache_options: CacheOptions) -> None:
    """Raise `InputError` if a cache of ``batch`` rows and ``length`` positions does not fit into free memory."""
    needed = cache_bytes(model, batch, length, cache_options)
    memory.check_cache(batch, length, needed, device.free_memory(model.mesh))


@functools.partial(jax.jit, donate_argnames=("cache", "last"))
def prefill(
    model: Model,
    ids: Int[Array, "B T"],
    cache: Cache,
    last: Float[Array, "B 1 D"],
    start: Int[Array, ""],
    lengths: Int[Array, "B"],
    scaled: Int[Array, "B T"] | None = None,
    adapters: Int[Array, "B"] | None = None,
    features: Float[Array, "B T D"] | None = None,
) -> tuple[Cache, Float[Array, "B 1 D"]]:
    """Run one chunk of right-padded prompts of ``lengths`` tokens: the T tokens from position ``start`` on.

    Returns the cache and the hidden state of each prompt's last token: ``last``, or the new one if this chunk holds
    it. ``scaled``: the length for which RoPE is scaled, per token; None is ``lengths``. ``adapters``: of
    each row, as in `adapter_rows`. ``features``: image tokens, as in `Decoder.embed`.
    """
    width = ids.shape[1]
    new = jnp.clip(lengths - start, 0, width)
    scaled = lengths if scaled is None else scaled
    with adapter_rows(adapters):
        begun = jnp.broadcast_to(start, lengths.shape)
        hidden, cache = model.decode(ids, cache, new, begun, scaled, features)
    at = (lengths - 1 - start)[:, None, None]
    found = jnp.take_along_axis(hidden, jnp.clip(at, 0, width - 1), axis=1)
    return cache, jnp.where((at >= 0) & (at < width), found, last)


@functools.partial(jax.jit, donate_argnames="cache")
def first_token(
    model: Model,
    cache: Cache,
    last: Float[Array, "B 1 D"],
    token_counts: Int[Array, "B V"] | None,
    rng: UInt32[Array, "B 2"],
    eos_ids: Int[Array, "E"] | Int[Array, "B E"],
    params: SamplingParams,
    forced: Int[Array, "B"] | None = None,
    allowed: UInt32[Array, "B W"] | None = None,
) -> State:
    """Sample each row's first token after its prompt; ``forced`` and ``allowed`` as in `sample_next`."""
    batch = len(last)
    draws = jax.random.wrap_key_data(rng)
    state = State(cache, jnp.zeros(batch, jnp.int32), token_counts, draws, jnp.zeros(batch, bool), eos_ids)
    return sample_next(state, model.head(last)[:, 0], params, forced, allowed)


@functools.partial(jax.jit, donate_argnames="state")
def decode(
    model: Model,
    state: State,
    steps: Int[Array, ""],
    params: SamplingParams,
    forced: Int[Array, "N B"] | None = None,
    allowed: UInt32[Array, "B W"] | None = None,
    adapters: Int[Array, "B"] | None = None,
) -> tuple[State, Int[Array, "N B"], Int[Array, ""], Scores | None]:
    """Generate up to ``steps`` (at most `STEPS`) more tokens per row; fewer if all rows finish.
    ``forced`` [STEPS, B]: as in `sample_next`, for each step. ``allowed``: likewise, the same in all steps.
    ``adapters``: of each row, as in `adapter_rows`.

    Returns the state, the tokens [STEPS, B], how many of the STEPS rows are valid, and the scores of the tokens.
    """

    def step(carry):
        state, made, count = carry
        with adapter_rows(adapters):
            hidden, cache = model.decode(state.token[:, None], state.cache, jnp.where(state.finished, 0, 1))
        now = None if forced is None else forced[count]
        state = sample_next(dataclasses.replace(state, cache=cache), model.head(hidden)[:, 0], params, now, allowed)
        made = jax.tree.map(lambda all_steps, new: all_steps.at[count].set(new), made, (state.token, state.scores))
        return state, made, count + 1

    def more(carry):
        state, _, count = carry
        return (count < steps) & ~jnp.all(state.finished)

    made = jax.tree.map(lambda x: jnp.zeros((STEPS, *x.shape), x.dtype), (state.token, state.scores))
    state, (tokens, scores), count = jax.lax.while_loop(more, step, (state, made, jnp.int32(0)))
    return state, tokens, count, scores


def sample_next(
    state: State,
    logits: Float[Array, "B V"],
    params: SamplingParams,
    forced: Int[Array, "B"] | None = None,
    allowed: UInt32[Array, "B W"] | None = None,
) -> State:
    """Sample the next token of each row.

    ``forced``: ids to take in place of a sampled one, or -1. ``allowed``: the tokens to sample from, as bits.
    """
    likely = logits if allowed is None else only_allowed(logits, allowed)
    both = jax.vmap(jax.random.split)(state.rng)
    token = sample(likely, state.token_counts, params, both[:, 1]).astype(jnp.int32)
    token = token if forced is None else jnp.where(forced >= 0, forced, token)
    token_counts = state.token_counts
    if token_counts is not None:
        token_counts = token_counts.at[jnp.arange(len(token)), token].add(IN_ANSWER)
    finished = state.finished | jnp.any(token[:, None] == state.eos_ids, axis=1)
    scores = None
    if params.scored is not None:  # few requests ask for them
        scores = jax.lax.cond(jnp.any(params.scored), lambda: score(logits, token), lambda: no_scores(*logits.shape))
    return State(state.cache, token, token_counts, both[:, 0], finished, state.eos_ids, scores)


def resize_state(state: State, slots: int) -> State:
    """The state with a cache of S slots."""
    return dataclasses.replace(state, cache=resize_cache(state.cache, slots))


@functools.partial(jax.jit, static_argnames="slots")
def resize_cache(cache: Cache, slots: int) -> Cache:
    """Pad the cache to S slots."""
    return cache.resized(slots)


def check_kind(model: Model, batch: int, cache_options: CacheOptions) -> None:
    """Raise `InputError` for cache options that this backend does not support for this model and batch."""
    if cache_options.max_kv_size is not None:
        raise InputError("is for MLX; leave it out, as the cache of JAX keeps every token.", option="max_kv_size")
    if cache_options.kv_bits == 4:
        raise InputError("is 4; the cache of JAX keeps keys and values whole or in 8 bits.", option="kv_bits")
    group, width, latent = cache_options.kv_group_size, model.config.head_dim, model.config.is_latent
    if group is not None and (latent or group != width):
        each = "latent and each rotary key" if latent else f"head of {width} numbers"
        raise InputError(
            f"is {group}; the 8-bit cache of JAX has one scale for each {each}: leave it out.",
            option="kv_group_size",
        )
    if start := cache_options.quantized_kv_start:
        raise InputError(
            f"is {start}; the cache of JAX is quantized from the first token on: leave it out, or give 0.",
            option="quantized_kv_start",
        )


def check(model: Model, request: GenerationRequest) -> None:
    """`minicpm_data.generation.api.Decoding.check`. Memory is checked when the prompts are prefilled."""
    if request.constraint is not None:
        raise InputError("is for requests to an engine; leave it out.", option="constraint")
    if request.logprobs is not None:
        raise InputError("is for requests to an engine; leave it out.", option="logprobs")
    if request.adapter:
        raise InputError("is for requests to an engine; load the model with one adapter.", option="adapter")
    check_kind(model, len(request.prompts), request.cache)


def stream_tokens(model: Model, request: GenerationRequest) -> Iterator[np.ndarray]:
    """`minicpm_data.generation.api.Decoding.stream_tokens`."""
    batch, longest, max_tokens = len(request.prompts), request.longest, request.max_tokens
    params = SamplingParams.of(request.sampling, model.config.vocab_size)
    thoughts = Thoughts(request.thinking, request.end_ids)
    state = prefill_and_sample(model, request)
    first = fetch(state.token)
    thoughts.add(first)
    yield first
    slots = state.cache.slots
    made, steps = 1, 1
    while made < max_tokens:
        if fetch(state.finished).all():
            return
        if longest + made > slots:
            slots = bucket_length(slots + ROOM)
            check_cache(model, batch, slots, request.cache)
            state = resize_state(state, slots)
        began = time.perf_counter()
        room = min(steps, max_tokens - made, slots - longest - made + 1, thoughts.free)
        state, tokens, count, _ = decode(model, state, np.int32(room), params, thoughts.forced(STEPS))
        found = fetch(tokens)[: int(count)]
        for step in found:
            thoughts.add(step)
        yield from found
        made += len(found)
        # Double the steps per call while a call is quick. Several processes do not measure: their clocks differ.
        quick = jax.process_count() > 1 or time.perf_counter() - began < PATIENCE / 2
        steps = min(STEPS, 2 * steps) if quick else steps


def prefill_and_sample(model: Model, request: GenerationRequest) -> State:
    """Prefill the prompts and sample each row's first token."""
    cache, last = prefill_prompts(model, request)
    sampling, vocab_size = request.sampling, model.config.vocab_size
    ends = np.array(sorted(request.end_ids) or [-1], np.int32)
    counted = map(penalized_ids, request.prompts)
    token_counts = count_tokens([*counted], vocab_size) if sampling.penalized else None
    rng = broadcast_from_main(sampling.row_keys(len(request.prompts)))
    params, forced = SamplingParams.of(sampling, vocab_size), Thoughts(request.thinking).forced(1)
    return first_token(model, cache, last, token_counts, rng, ends, params, None if forced is None else forced[0])


def prefill_prompts(model: Model, request: GenerationRequest) -> tuple[Cache, Float[Array, "B 1 D"]]:
    """A cache that holds the prompts and has room for an answer, and the hidden state of each prompt's last token."""
    prompts, longest, slots, begun = request.prompts, request.longest, cache_length(request), request.begun
    check_cache(model, len(prompts), slots, request.cache)
    use_compilation_cache()
    lengths = np.array([len(p) for p in prompts], np.int32)
    width = prefill_chunk(longest - begun, request.cache)
    cache, last = empty(model, len(prompts), slots, request.cache.kv_bits)
    if request.prefix is not None:
        cache = restore(model, cache, request.prefix)
    cache, last = at_home(model, (cache, last))
    for start in range(begun, longest, width):
        ids, features = padded_inputs([chunk_inputs(model, p, p, start, start + width) for p in prompts], width)
        seen = {} if features is None else {"features": features}  # no other program for a text
        cache, last = prefill(model, ids, cache, last, np.int32(start), lengths, **seen)
    return cache, last


def home_of(model: Model) -> Sharding | None:
    """Where the weights are, if they are committed to a place. So are the results of programs that read them."""
    return next((x.sharding for x in jax.tree.leaves(model) if x.committed), None)


def at_home(model: Model, arrays: Any) -> Any:
    """Arrays that no weight went into, in the place of the model's results: otherwise the first chunk of a prompt would
    need another program than the second one. XLA places those of a mesh."""
    home = home_of(model) if model.mesh is None else None
    return arrays if home is None else jax.device_put(arrays, home)


def cached_prompt(model: Model, request: GenerationRequest) -> CachedPrompt:
    """`minicpm_data.generation.api.Decoding.cached_prompt`."""
    cache, _ = prefill_prompts(model, request)
    return stored(model.config, cache, len(request.prompt))


def cache_length(request: GenerationRequest) -> int:
    """Cache slots for a request: the padded prompts and at first at most `ROOM` tokens of the answer."""
    begun, left = request.begun, request.longest - request.begun
    width = prefill_chunk(left, request.cache)
    padded = begun + -(-left // width) * width
    padded = bucket_length(padded) if begun else padded
    return max(padded, bucket_length(request.longest + min(request.max_tokens, ROOM)))


def prefill_chunk(longest: int, cache_options: CacheOptions) -> int:
    """Tokens of a prompt that run in one call."""
    return min(bucket_length(longest), bucket_length(cache_options.prefill_step_size))


def bucket_length(length: int) -> int:
    """The smallest of 32, 64, ... 1024, 2048, 3072, ... that holds ``length``. Always doubling would waste memory in
    long caches."""
    return max(32, 1 << (int(length) - 1).bit_length()) if length <= 1024 else -(-int(length) // 1024) * 1024


def use_compilation_cache() -> None:
    """Cache compiled programs on disk (``~/.cache/minicpm_jax``) unless JAX_COMPILATION_CACHE_DIR is set."""
    if jax.config.jax_compilation_cache_dir is None:
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minicpm_jax"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # no writable home: compile in every process
            return
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
