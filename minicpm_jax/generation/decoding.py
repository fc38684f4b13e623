"""Prefill and the decode loop, compiled once for each size of prompt and cache.

Prompts are padded on the right to one of few lengths and long ones run piece by piece, so that few programs serve all
of them. Decoding runs many steps in one call (a `while_loop` on the device), so a token costs neither a dispatch nor a
transfer of its own.
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
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt32

from minicpm_data.generation.options import CacheOptions, seen_tokens
from minicpm_data.generation.request import GenerationRequest
from minicpm_jax import device
from minicpm_jax.cpu.form import form_of_model
from minicpm_jax.generation.sampling import Knobs, sample
from minicpm_jax.layers.kv_cache import STORED, Cache, placement
from minicpm_jax.model import Model
from minicpm_jax.parallel.processes import fetched, from_first
from weights_io import memory
from weights_io.config import ModelConfig
from weights_io.errors import InputError

STEPS = 32  # most tokens of one call of the decode loop
PATIENCE = 0.1  # seconds a reader may wait for the next piece of text
ROOM = 1024  # cache slots for an answer; a longer one makes the cache grow


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "token", "seen", "keys", "done", "end_ids"],
    meta_fields=[],
)
@dataclass(frozen=True)
class State:
    """Where the rows of a batch stand between two calls."""

    cache: Cache
    token: Int[Array, "B"]  # the last one chosen, not yet in the cache
    seen: Bool[Array, "B V"] | None  # for the repetition penalty
    keys: Array  # [B] of jax.random
    done: Bool[Array, "B"]  # rows that have ended
    end_ids: Int[Array, "E"] | Int[Array, "B E"]


@functools.partial(jax.jit, static_argnames=("batch", "slots", "bits"))
def empty(model: Model, batch: int, slots: int, bits: int | None) -> tuple[Cache, Float[Array, "B 1 D"]]:
    """A cache, and the place for each row's last hidden state."""
    dtype, mesh = model.model.norm.weight.dtype, model.mesh
    cache = Cache.empty(model.config, batch, slots, form_of_model(model).cache_dtype(model), bits, mesh)
    if mesh is not None:  # else each device would have all of it
        specs = placement(cache, mesh)
        where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        cache = jax.lax.with_sharding_constraint(cache, where)
    return cache, jnp.zeros((batch, 1, model.config.hidden_size), dtype)


def cache_bytes(model: Model, batch: int, length: int, cache_options: CacheOptions) -> int:
    """Of the cache of so many rows and positions, on each device."""
    dtype = form_of_model(model).cache_dtype(model)
    return _cache_bytes(model.config, batch, length, dtype, cache_options.kv_bits, model.mesh)


@functools.lru_cache  # tracing takes 2 ms, as long as a head of MiniCPM-1B
def _cache_bytes(config: ModelConfig, batch: int, slots: int, dtype: Any, bits: int | None, mesh: Mesh | None) -> int:
    cache = jax.eval_shape(lambda: Cache.empty(config, batch, slots, dtype, bits, mesh))
    specs = placement(cache, mesh) if mesh is not None else cache

    def bytes_of(x, spec):
        shape = x.shape if mesh is None else NamedSharding(mesh, spec).shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(bytes_of, cache, specs)))


def check_cache(model: Model, batch: int, length: int, cache_options: CacheOptions) -> None:
    """`InputError` where there is no room for a cache of so many rows and positions."""
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
) -> tuple[Cache, Float[Array, "B 1 D"]]:
    """Run the T tokens from position ``start`` on of right-padded prompts of ``lengths`` tokens."""
    width = ids.shape[1]
    new = jnp.clip(lengths - start, 0, width)
    hidden, cache = model.decode(ids, cache, new, jnp.broadcast_to(start, lengths.shape), lengths)
    at = (lengths - 1 - start)[:, None, None]
    found = jnp.take_along_axis(hidden, jnp.clip(at, 0, width - 1), axis=1)
    return cache, jnp.where((at >= 0) & (at < width), found, last)


@functools.partial(jax.jit, donate_argnames="cache")
def begin(
    model: Model,
    cache: Cache,
    last: Float[Array, "B 1 D"],
    seen: Bool[Array, "B V"] | None,
    keys: UInt32[Array, "B 2"],
    end_ids: Int[Array, "E"] | Int[Array, "B E"],
    knobs: Knobs,
) -> State:
    """Choose the first token of each row after its prompt."""
    batch = len(last)
    draws = jax.random.wrap_key_data(keys)
    state = State(cache, jnp.zeros(batch, jnp.int32), seen, draws, jnp.zeros(batch, bool), end_ids)
    return chosen(state, model.head(last)[:, 0], knobs)


@functools.partial(jax.jit, donate_argnames="state")
def decode(
    model: Model, state: State, steps: Int[Array, ""], knobs: Knobs
) -> tuple[State, Int[Array, "N B"], Int[Array, ""]]:
    """Up to ``steps`` (at most `STEPS`) more tokens for each row, fewer where all rows end. Returns the state, the
    tokens [STEPS, B] and how many of them are real."""

    def step(carry):
        state, tokens, count = carry
        hidden, cache = model.decode(state.token[:, None], state.cache, jnp.where(state.done, 0, 1))
        state = chosen(dataclasses.replace(state, cache=cache), model.head(hidden)[:, 0], knobs)
        return state, tokens.at[count].set(state.token), count + 1

    def more(carry):
        state, _, count = carry
        return (count < steps) & ~jnp.all(state.done)

    tokens = jnp.zeros((STEPS, *state.token.shape), jnp.int32)
    return jax.lax.while_loop(more, step, (state, tokens, jnp.int32(0)))


def chosen(state: State, logits: Float[Array, "B V"], knobs: Knobs) -> State:
    """The state with the next token of each row."""
    both = jax.vmap(jax.random.split)(state.keys)
    token = sample(logits, state.seen, knobs, both[:, 1]).astype(jnp.int32)
    seen = None if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True)
    done = state.done | jnp.any(token[:, None] == state.end_ids, axis=1)
    return State(state.cache, token, seen, both[:, 0], done, state.end_ids)


def grown(state: State, slots: int) -> State:
    """The same with S cache slots."""
    return dataclasses.replace(state, cache=longer(state.cache, slots))


@functools.partial(jax.jit, static_argnames="slots")
def longer(cache: Cache, slots: int) -> Cache:
    """The same with S slots."""
    more = slots - cache.slots

    def padded(stored, axis):
        return None if stored is None else jnp.pad(stored, [(0, more if i == axis else 0) for i in range(4)])

    return dataclasses.replace(cache, **{name: padded(getattr(cache, name), axis) for name, axis in STORED.items()})


def check_kind(model: Model, batch: int, cache_options: CacheOptions) -> None:
    """`InputError` for a kind of cache that is not here, whatever model and batch."""
    if cache_options.max_kv_size is not None:
        raise InputError("is for MLX; leave it out, as the cache of JAX keeps every token.", option="max_kv_size")
    if cache_options.kv_bits == 4:
        raise InputError("is 4; the cache of JAX keeps keys and values whole or in 8 bits.", option="kv_bits")


def check(model: Model, request: GenerationRequest) -> None:
    """`minicpm_data.generation.api.Decoding.check`; room is looked for when the prompts are run."""
    check_kind(model, len(request.prompts), request.cache)


def stream_tokens(model: Model, request: GenerationRequest) -> Iterator[np.ndarray]:
    """`minicpm_data.generation.api.Decoding.stream_tokens`."""
    batch, longest, max_tokens = len(request.prompts), request.longest, request.max_tokens
    knobs = Knobs.of(request.sampling, model.config.vocab_size)
    state = started(model, request)
    yield fetched(state.token)
    slots = state.cache.slots
    made, steps = 1, 1
    while made < max_tokens:
        if fetched(state.done).all():
            return
        if longest + made > slots:
            slots = bucket(slots + ROOM)
            check_cache(model, batch, slots, request.cache)
            state = grown(state, slots)
        began = time.perf_counter()
        room = min(steps, max_tokens - made, slots - longest - made + 1)
        state, tokens, count = decode(model, state, np.int32(room), knobs)
        count = int(count)
        yield from fetched(tokens)[:count]
        made += count
        # Grow the call while the reader does not have to wait for it; the clocks of several processes would differ.
        quick = jax.process_count() > 1 or time.perf_counter() - began < PATIENCE / 2
        steps = min(STEPS, 2 * steps) if quick else steps


def started(model: Model, request: GenerationRequest) -> State:
    """Each prompt run, and its row's first token chosen."""
    cache, last = filled(model, request)
    sampling, vocab_size = request.sampling, model.config.vocab_size
    ends = np.array(sorted(request.end_ids) or [-1], np.int32)
    seen = seen_tokens(request.prompts, vocab_size) if sampling.penalised else None
    keys = from_first(sampling.row_keys(len(request.prompts)))
    return begin(model, cache, last, seen, keys, ends, Knobs.of(sampling, vocab_size))


def filled(model: Model, request: GenerationRequest) -> tuple[Cache, Float[Array, "B 1 D"]]:
    """A cache that holds the prompts and has room for an answer, and the last hidden state of each."""
    prompts, longest, slots = request.prompts, request.longest, slots_for(request)
    check_cache(model, len(prompts), slots, request.cache)
    use_compilation_cache()
    lengths = np.array([len(p) for p in prompts], np.int32)
    width = piece_of(longest, request.cache)
    cache, last = empty(model, len(prompts), slots, request.cache.kv_bits)
    for start in range(0, longest, width):
        ids = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            part = prompt[start : start + width]
            row[: len(part)] = part
        cache, last = prefill(model, ids, cache, last, np.int32(start), lengths)
    return cache, last


def slots_for(request: GenerationRequest) -> int:
    """Cache slots for the prompts, padding included, and for the answer, but of that at first `ROOM` at most."""
    width = piece_of(request.longest, request.cache)
    return max(-(-request.longest // width) * width, bucket(request.longest + min(request.max_tokens, ROOM)))


def piece_of(longest: int, cache_options: CacheOptions) -> int:
    """Tokens of a prompt that are run together."""
    return min(bucket(longest), bucket(cache_options.prefill_step_size))


def bucket(length: int) -> int:
    """The least of 32, 64, ... 1024, 2048, 3072, ... that holds ``length``: always doubling would waste long caches."""
    return max(32, 1 << (int(length) - 1).bit_length()) if length <= 1024 else -(-int(length) // 1024) * 1024


def use_compilation_cache() -> None:
    """Keep compiled programs on disk (``~/.cache/minicpm_jax``) unless JAX_COMPILATION_CACHE_DIR says where."""
    if jax.config.jax_compilation_cache_dir is None:
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minicpm_jax"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # no home, or one that is not ours to write: compile anew each time
            return
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
