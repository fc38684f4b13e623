"""`minicpm_data.generation.engine` on the compiled programs of `decoding`: one decode step serves all slots.

A prompt is prefilled in a one-row cache of its own, which is then copied into the request's slot. So no program
depends on the slot, and decoding continues meanwhile. An empty slot is a finished row.

Programs are compiled beside decoding (`programs`), and there are few: caches have 128, 512, 2048 .. positions, chunks
of a prompt have one of two widths, and every kind of sampling is data. (Attention reads the filled blocks of a cache,
so a step takes as long in a larger one.)

Dims: B slots (concurrent requests), S cache slots of each, R cache slots of a prompt's row, T width of a chunk,
E end-of-text ids, V vocabulary.
"""

import dataclasses
import weakref
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minicpm_data.generation import engine
from minicpm_data.generation.constraint import allowed_rows
from minicpm_data.generation.engine import RequestState, shared
from minicpm_data.generation.options import GREEDY, PLAIN_CACHE, CacheOptions, seen_tokens
from minicpm_data.generation.thinking import forced_steps
from minicpm_jax import device
from minicpm_jax.generation import decoding
from minicpm_jax.generation.decoding import STEPS, State, bucket_length
from minicpm_jax.generation.programs import Key, Programs
from minicpm_jax.generation.sampling import SamplingParams
from minicpm_jax.generation.shapes import Shapes
from minicpm_jax.generation.slots import ENDS, insert, mark_finished, row_of
from minicpm_jax.layers.kv_cache import Cache
from minicpm_jax.model import Model
from minicpm_jax.parallel.chips import platform

NARROW = 32  # tokens of a narrow chunk: the last ones of a prompt, and on a CPU those that others would wait for
LEAST, GROWTH = 128, 4  # positions of the smallest cache, and the step to the next larger one


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

        self._most = most(self.context)
        self._wide = decoding.prefill_chunk(self.context, cache_options)
        free = device.free_memory(model.mesh)
        self._check_room(needed, free)
        # A cache that grows is held twice for a moment.
        roomy = free is None or needed(self.context, 2) <= free
        begun = self._cache_length(1) if roomy else self._most
        cache, _ = decoding.empty(model, slots, begun, cache_options.kv_bits)
        rng = jax.random.split(jax.random.key(0), slots)
        nobody = np.full((slots, ENDS), -1, np.int32)
        token_mask = jnp.zeros((slots, model.config.vocab_size), bool)
        state = State(cache, jnp.zeros(slots, jnp.int32), token_mask, rng, jnp.ones(slots, bool), nobody)
        self.shapes = Shapes(model, cache_options)
        self.state = self.shapes.placed(state, self.shapes.state(slots, begun))
        self.rows: list[RequestState | None] = [None] * slots  # the present or last request of each slot
        self.order = list(range(slots))  # free slots, least recently used first
        self.first: list[tuple[int, int]] = []  # (request, token) sampled at the end of prefill
        self._programs = Programs(self._compiled)
        self._programs.on_change = lambda: self.wake()
        self._programs.on_done = lambda key, seconds: self.compiled(str(key), seconds)
        # Requests that wait for programs -> `Programs.changes` when they were last looked at.
        self._looked: weakref.WeakKeyDictionary[RequestState, int] = weakref.WeakKeyDictionary()

    def _cache_length(self, length: int) -> int:
        """The positions of the smallest cache that holds ``length``."""
        positions = LEAST
        while positions < length:
            positions *= GROWTH
        return min(positions, self._most)

    def _row_length(self, length: int, start: int) -> int:
        """The positions of the row for a prompt of which ``start`` tokens are copied; its last chunk is padded."""
        return self._cache_length(start + -(-(length - start) // NARROW) * NARROW)

    def _ready(self, state: RequestState) -> bool:
        changes = self._programs.changes
        if self._looked.get(state) == changes:
            return False
        self._looked[state] = changes
        ready = self._programs.ready(self._needed(state))
        if ready:
            del self._looked[state]
        return ready

    def _needed(self, state: RequestState) -> list[Key]:
        """The programs that a request needs now, the one that takes longest first."""
        prompt, held = state.prompt, self.state.cache.slots
        _, start = self._source(prompt)
        row = self._row_length(len(prompt), start)
        length = max(held, row, self._cache_length(len(prompt) + state.request.max_tokens + 1))
        grown = [Key("resize", (held, length))] if length > held else []
        begun = Key("row_of", (held, row)) if start else Key("empty", (row,))
        common = Key("decode", (length,)), Key("prefill", (NARROW, row)), Key("first_token")
        return [*common, begun, Key("insert", (length, row)), *grown, Key("mark_finished")]

    def _compiled(self, key: Key) -> object:
        """The compiled program of a key."""
        return self.shapes.lowered(key, self.slots).compile()

    def programs(self) -> dict[str, int]:
        return self._programs.counts()

    def warm(self) -> None:
        """First what the next prompts need in the present cache, then wide chunks, then larger caches."""
        held, most = self.state.cache.slots, self._most
        lengths = sorted({self._cache_length(LEAST * GROWTH**i) for i in range(most.bit_length())})
        keys = [Key("decode", (held,)), Key("first_token"), Key("mark_finished")]
        fitting = [row for row in lengths if row <= held]
        for row in fitting:
            keys += [Key("prefill", (NARROW, row)), Key("empty", (row,))]
            keys += [Key("insert", (held, row)), Key("row_of", (held, row))]
        keys += [Key("prefill", (self._wide, row)) for row in fitting if row >= self._wide]
        for length in (length for length in lengths if length > held):
            keys += [Key("prefill", (NARROW, length)), Key("empty", (length,)), Key("decode", (length,))]
            keys += [Key("resize", (old, length)) for old in lengths if held <= old < length]
            keys += [Key(name, (length, row)) for row in lengths if row <= length for name in ("insert", "row_of")]
            keys += [Key("prefill", (self._wide, length))]
        self._programs.warm(keys)

    def close(self) -> None:
        self._programs.close()

    def _wait(self) -> None:
        changes = self._programs.changes
        if self.blocked:
            self._programs.wait(changes)

    def _run(self, state: RequestState) -> Iterator[None]:
        request, prompt = state.request, state.prompt
        source, start = self._source(prompt)
        row_length = self._row_length(len(prompt), start)
        if start:
            cache = row_of(self.state.cache, np.int32(source), np.int32(start), row_length)
            last = np.zeros((1, 1, self.model.config.hidden_size), self.model.model.norm.weight.dtype)
        else:
            cache, last = decoding.empty(self.model, 1, row_length, request.cache.kv_bits)
        row_shape, lengths = self.shapes.row(row_length), np.array([len(prompt)], np.int32)
        begun = start
        while start < len(prompt):
            if start > begun:
                yield
            width = self._chunk(len(prompt) - start, row_length, start)
            ids = np.zeros((1, width), np.int32)
            part = prompt[start : start + width]
            ids[0, : len(part)] = part
            cache, last = self.shapes.placed((cache, last), row_shape)
            cache, last = decoding.prefill(self.model, ids, cache, last, np.int32(start), lengths)
            start += width
        row = self._first_token(state, *self.shapes.placed((cache, last), row_shape))
        slot = self._take(source if begun else None)
        length = self._cache_length(len(prompt) + request.max_tokens + 1)
        if max(row_length, length) > self.state.cache.slots:
            grown = decoding.resize_state(self.state, max(row_length, length))
            self.state = self.shapes.placed(grown, self.shapes.state(self.slots, grown.cache.slots))
        self._keep(insert(self.state, row, np.int32(slot)))
        self.rows[slot] = state
        self.first.append((state.number, int(np.asarray(row.token)[0])))

    def _chunk(self, left: int, row_length: int, start: int) -> int:
        """Tokens of the next chunk of a prompt. On a CPU, where a wide chunk takes seconds and is hardly more
        efficient, the answers of others do not wait for one."""
        waited_for = platform() == "cpu" and bool(self.running)
        if self._wide == NARROW or left <= self._wide // 2 or start + self._wide > row_length or waited_for:
            return NARROW
        key = Key("prefill", (self._wide, row_length))
        if self._programs.has(key):
            return self._wide
        self._programs.warm([key])
        return NARROW

    def _first_token(self, state: RequestState, cache: Cache, last: Array) -> State:
        """The row of a request, with its first token. The program does not get the cache, so it suits every length."""
        request, vocabulary = state.request, self.model.config.vocab_size
        found = sorted(request.end_ids)[:ENDS]
        eos_ids = np.array([found + [-1] * (ENDS - len(found))], np.int32)
        params = SamplingParams.of_rows([request.sampling], vocabulary)
        token_mask, rng, nothing = seen_tokens([state.prompt], vocabulary), request.sampling.row_keys(1), None
        forced = forced_steps([state.thought], 1)[0]
        allowed = allowed_rows([state.matcher], vocabulary)
        row = decoding.first_token(self.model, nothing, last, token_mask, rng, eos_ids, params, forced, allowed)
        row = self.shapes.placed(row, self.shapes.state(1, None))
        return dataclasses.replace(row, cache=cache)

    def _keep(self, state: State) -> None:
        self.state = self.shapes.placed(state, self.shapes.state(self.slots, state.cache.slots))

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
        running = [row if row and row.number in self.running else None for row in self.rows]
        vocabulary = self.model.config.vocab_size
        params = SamplingParams.of_rows([row.request.sampling if row else GREEDY for row in running], vocabulary)
        for row in filter(None, running):
            if row.thought is not None:
                row.thought.see(row.generated)
                steps = min(steps, row.thought.free)
            if row.matcher is not None:
                row.matcher.see(row.generated)
                steps = 1
        forced = forced_steps([row.thought if row else None for row in running], STEPS)
        allowed = allowed_rows([row.matcher if row else None for row in running], vocabulary)
        many = np.int32(min(steps, STEPS))
        state, tokens, count = decoding.decode(self.model, self.state, many, params, forced, allowed)
        self._keep(state)
        found = np.asarray(tokens)[: int(count)]
        return [(row.number, int(step[slot])) for step in found for slot, row in here]

    def _free(self, state: RequestState) -> None:
        slot = self.rows.index(state)
        self.order.append(slot)
        self.first = [made for made in self.first if made[0] != state.number]
        self._keep(dataclasses.replace(self.state, finished=mark_finished(self.state.finished, np.int32(slot))))
