"""`minicpm_data.generation.engine` on the compiled programs of `decoding`: one decode step serves all slots.

A prompt is prefilled in a one-row cache of its own, which is then copied into the request's slot. So no program
depends on the slot, and decoding continues meanwhile. An empty slot is a finished row.

Dims: B slots (concurrent requests), S cache slots of each, E end-of-text ids, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minicpm_data.generation import engine
from minicpm_data.generation.engine import RequestState, shared
from minicpm_data.generation.options import GREEDY, PLAIN_CACHE, CacheOptions, Sampling, seen_tokens
from minicpm_jax import device
from minicpm_jax.generation import decoding
from minicpm_jax.generation.decoding import STEPS, State, bucket_length
from minicpm_jax.generation.sampling import SamplingParams
from minicpm_jax.layers.kv_cache import STORED, Cache
from minicpm_jax.model import Model

ENDS = 8  # end-of-text ids checked on the device; the host checks the rest, a few steps later


@functools.partial(jax.jit, donate_argnames="state")
def insert(state: State, row: State, slot: Int[Array, ""]) -> State:
    """Copy a one-row state, whose cache may be shorter, into a slot."""

    def write(stored, new):
        at = (slot,) + (0,) * (stored.ndim - 1)
        return jax.lax.dynamic_update_slice(stored, new.astype(stored.dtype), at)

    def write_cache(stored, new):  # [L, B, ..]
        return None if stored is None else jax.lax.dynamic_update_slice(stored, new, (0, slot, 0, 0))

    cache, new = state.cache, row.cache
    written = {name: write_cache(getattr(cache, name), getattr(new, name)) for name in STORED}
    rng = write(jax.random.key_data(state.rng), jax.random.key_data(row.rng))
    return State(
        dataclasses.replace(cache, lengths=write(cache.lengths, new.lengths), **written),
        write(state.token, row.token),
        write(state.token_mask, row.token_mask),
        jax.random.wrap_key_data(rng),
        write(state.finished, row.finished),
        write(state.eos_ids, row.eos_ids),
    )


@functools.partial(jax.jit, static_argnames="slots")
def row_of(cache: Cache, slot: Int[Array, ""], length: Int[Array, ""], slots: int) -> Cache:
    """A one-row cache with the first ``length`` tokens of a slot."""

    def part(stored, axis):
        if stored is None:
            return None
        entries = slots // cache.grain
        more = entries - stored.shape[axis]
        begun = jax.lax.slice_in_dim(stored, 0, min(entries, stored.shape[axis]), axis=axis)
        row = jnp.take(begun, slot[None], axis=1, mode="clip")  # slicing over a mesh would communicate all rows
        return jnp.pad(row, [(0, max(more, 0) if i == axis else 0) for i in range(4)])

    arrays = {name: part(getattr(cache, name), axis) for name, axis in STORED.items()}
    return dataclasses.replace(cache, lengths=length[None], **arrays)


@functools.partial(jax.jit, donate_argnames="state")
def mark_finished(state: State, slot: Int[Array, ""]) -> State:
    """Mark the slot's row as finished."""
    return dataclasses.replace(state, finished=state.finished.at[slot].set(True))


class Engine(engine.BatchEngine[Model]):
    def __init__(
        self,
        model: Model,
        slots: int = 8,
        context: int | None = None,
        cache_options: CacheOptions = PLAIN_CACHE,
    ):
        super().__init__(model, slots, context, cache_options)
        decoding.check_kind(model, slots, cache_options)
        decoding.use_compilation_cache()

        def most(context: int) -> int:
            """Cache slots of a request of ``context`` tokens, with its padded last chunk."""
            return bucket_length(context + decoding.prefill_chunk(context, cache_options))

        def needed(context: int, times: int = 1) -> int:
            """Bytes of ``times`` full caches and of the one-row cache in prefill."""
            full, row = (decoding.cache_bytes(model, n, most(context), cache_options) for n in (slots, 1))
            return times * full + row

        free = device.free_memory(model.mesh)
        self._check_room(needed, free)
        # A cache that grows is held twice for a moment.
        roomy = free is None or needed(self.context, 2) <= free
        begun = bucket_length(1) if roomy else most(self.context)
        cache, _ = decoding.empty(model, slots, begun, cache_options.kv_bits)
        rng = jax.random.split(jax.random.key(0), slots)
        nobody = np.full((slots, ENDS), -1, np.int32)
        token_mask = jnp.zeros((slots, model.config.vocab_size), bool)
        self.state = State(cache, jnp.zeros(slots, jnp.int32), token_mask, rng, jnp.ones(slots, bool), nobody)
        self.rows: list[RequestState | None] = [None] * slots  # the present or last request of each slot
        self.order = list(range(slots))  # free slots, least recently used first
        self.first: list[tuple[int, int]] = []  # (request, token) sampled at the end of prefill

    def _run(self, state: RequestState) -> Iterator[None]:
        request, prompt = state.request, state.prompt
        source, start = self._source(prompt)
        width = decoding.prefill_chunk(len(prompt) - start, request.cache)
        ends = range(start + width, len(prompt) + width, width)  # of the chunks; the last one is padded
        slots = bucket_length(max(len(prompt) + 1, ends[-1]))
        if start:
            cache, last = row_of(self.state.cache, np.int32(source), np.int32(start), slots), self._nothing()
        else:
            cache, last = decoding.empty(self.model, 1, slots, request.cache.kv_bits)
        lengths = np.array([len(prompt)], np.int32)
        for end in ends:
            if end > ends[0]:
                yield
            ids = np.zeros((1, width), np.int32)
            part = prompt[end - width : end]
            ids[0, : len(part)] = part
            cache, last = decoding.prefill(self.model, ids, cache, last, np.int32(end - width), lengths)
        found, sampling = sorted(request.end_ids)[:ENDS], request.sampling
        eos_ids = np.array([found + [-1] * (ENDS - len(found))], np.int32)
        vocabulary = self.model.config.vocab_size
        token_mask, params = seen_tokens([prompt], vocabulary), SamplingParams.of(sampling, vocabulary)
        row = decoding.first_token(self.model, cache, last, token_mask, sampling.row_keys(1), eos_ids, params)
        slot = self._take(source if start else None)
        needed = max(slots, bucket_length(len(prompt) + request.max_tokens + 1))
        if needed > self.state.cache.slots:
            self.state = decoding.resize_state(self.state, needed)
        self.state = insert(self.state, row, np.int32(slot))
        self.rows[slot] = state
        self.first.append((state.number, int(row.token[0])))

    def _nothing(self) -> Array:
        return jnp.zeros((1, 1, self.model.config.hidden_size), self.model.model.norm.weight.dtype)

    def _source(self, prompt: Sequence[int]) -> tuple[int, int]:
        """The slot whose text shares the longest prefix with the prompt, and how many of those tokens can be copied."""
        lengths = [0 if old is None else shared(self.model.config, prompt, old) for old in self.rows]
        return int(np.argmax(lengths)), max(lengths)

    def _take(self, wanted: int | None) -> int:
        """A free slot: ``wanted`` if it is free, otherwise the least recently used."""
        slot = wanted if wanted in self.order else self.order[0]
        assert slot is not None
        self.order.remove(slot)
        return slot

    def _decode(self, steps: int) -> list[tuple[int, int]]:
        made, self.first = self.first, []
        if made:  # deliver first tokens first: a request may already be finished
            return made
        here = [(slot, row) for slot, row in enumerate(self.rows) if row is not None and row.number in self.running]
        params = self._params(
            [row.request.sampling if row and row.number in self.running else GREEDY for row in self.rows]
        )
        self.state, tokens, count = decoding.decode(self.model, self.state, np.int32(min(steps, STEPS)), params)
        found = np.asarray(tokens)[: int(count)]
        return [(row.number, int(step[slot])) for step in found for slot, row in here]

    def _params(self, samplings: list[Sampling]) -> SamplingParams:
        """The rows' parameters [B, 1]; empty slots are greedy."""
        vocabulary = self.model.config.vocab_size
        each = [SamplingParams.of(sampling, vocabulary) for sampling in samplings]
        numbers = {
            f.name: np.stack([getattr(params, f.name) for params in each])[:, None]
            for f in dataclasses.fields(SamplingParams)
            if f.name not in ("greedy", "penalized")
        }
        return SamplingParams(
            **numbers, greedy=all(params.greedy for params in each), penalized=any(params.penalized for params in each)
        )

    def _free(self, state: RequestState) -> None:
        slot = self.rows.index(state)
        self.order.append(slot)
        self.first = [made for made in self.first if made[0] != state.number]
        self.state = mark_finished(self.state, np.int32(slot))
