"""`minicpm_data.generation.engine` on the compiled programs of `decoding`: one decode step serves all slots.

Prompts and answers live in the pages of one pool (`layers.paged_cache`), of which every slot has a table. A prompt is
prefilled in chunks straight into its pages; so no program depends on the slot, and decoding continues meanwhile. An
empty slot is a finished row of length 0.

Programs are compiled beside decoding (`programs`), and there are six: chunks of a prompt have one of two widths, and
every kind of sampling is data. Speculation adds one, and a draft model three.

Dims: B slots (concurrent requests), W pages of a table, T width of a chunk, E end-of-text ids, V vocabulary.
"""

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from minicpm_data.generation import engine
from minicpm_data.generation.constraint import allowed_rows
from minicpm_data.generation.guessing import Guessing
from minicpm_data.generation.image_prompt import ImagePrompt, chunk_inputs, padded_inputs, penalized_ids
from minicpm_data.generation.options import GREEDY, PLAIN_CACHE, CacheOptions, count_tokens
from minicpm_data.generation.pages import Row
from minicpm_data.generation.prompt_cache import CachedPrompt, Prefix, PromptCache
from minicpm_data.generation.request_state import RequestState
from minicpm_data.generation.speculation import Speculation
from minicpm_data.generation.thinking import forced_steps
from minicpm_jax import device
from minicpm_jax.generation import decoding
from minicpm_jax.generation.decoding import STEPS, State
from minicpm_jax.generation.drafts import Drafts
from minicpm_jax.generation.programs import Key, Programs
from minicpm_jax.generation.prompt_cache import restore, stored
from minicpm_jax.generation.sampling import SamplingParams, Scores
from minicpm_jax.generation.shapes import Shapes
from minicpm_jax.generation.slots import ENDS, insert, vacate
from minicpm_jax.generation.verification import verify_rows
from minicpm_jax.model import Model
from minicpm_jax.parallel.chips import platform
from weights_io.errors import InputError

NARROW = 32  # tokens of a narrow chunk: the last ones of a prompt, and on a CPU those that others would wait for
PAGE_BYTES = 64 << 10  # least bytes of a page's keys: a TPU fetches smaller ones at less than its bandwidth
LEAST_PAGE, INT8_PAGE = 32, 128  # tokens; the scales of an int8 page fill a register of 128 lanes
ANSWER = 1024  # tokens a slot for which a CPU, whose memory others need too, has pages; beyond them slots share
RESERVED = 350_000_000  # bytes of a chip for programs and activations
TABLES = 512 << 10  # bytes: of the scalar memory in which a TPU's kernel reads all tables


class Engine(engine.BatchEngine[Model]):
    def __init__(
        self,
        model: Model,
        slots: int = 8,
        context: int | None = None,
        cache_options: CacheOptions = PLAIN_CACHE,
        cache_tokens: int | None = None,
        speculation: Speculation[Model] | None = None,
        prompt_cache: PromptCache | None = None,
    ):
        super().__init__(model, slots, context, cache_options, cache_tokens, speculation, prompt_cache)
        decoding.check_kind(model, slots, cache_options)
        decoding.use_compilation_cache()
        page = page_size(model, cache_options)
        self._width = -(-self.context // page)
        self._check_tables()

        draft = None if self.guessing is None else self.guessing.draft_model

        def bytes_of(pages: int) -> int:
            both = [model] if draft is None else [model, draft]
            return sum(decoding.cache_bytes(each, pages, page, cache_options) for each in both)

        most = slots * self.context
        if platform() == "cpu":
            most = min(most, self.context + slots * ANSWER)
        free = device.free_memory(model.mesh)
        if free is not None and platform() != "cpu":
            free -= RESERVED
            if self.guessing is not None:  # the logits after all guesses, and what is made of them to sample
                free -= 2 * 4 * slots * (self.guessing.count + 1) * model.config.vocab_size
        self.pool = self._pool(page, bytes_of, free, most, cache_tokens)
        self._wide = decoding.prefill_chunk(self.context, cache_options)
        self._tables = np.zeros((slots, self._width), np.int32)
        self.shapes = Shapes(model, cache_options, self.pool.pages, page, self._width)
        self.state = self.shapes.placed(self.shapes.empty(slots), self.shapes.state(slots))
        self.rows: list[RequestState | None] = [None] * slots
        self._drafts: Drafts | None = None
        if self.guessing is not None and draft is not None:
            sizes = self.pool.pages, page, self._width
            self._drafts = Drafts(draft, self.guessing.count, cache_options, slots, sizes, NARROW)
        self._keys: dict[int, np.ndarray] = {}  # random keys of requests that gave up their pages
        self._programs = Programs(self._compiled)
        self._programs.on_change = lambda: self.wake()
        self._programs.on_done = lambda key, seconds: self.compiled(str(key), seconds)
        # Requests that wait for programs -> `Programs.changes` when they were last looked at.
        self._looked: weakref.WeakKeyDictionary[RequestState, int] = weakref.WeakKeyDictionary()
        if prompt_cache is not None:
            row = self._pin(prompt_cache, whole=True)
            self.pool.name(row, prompt_cache.ids[: len(row.pages) * page])

    def _check_tables(self) -> None:
        """Raises `InputError` where the tables do not fit the scalar memory of a TPU."""
        tables = self.slots * self._width * 4
        if platform() == "tpu" and tables > TABLES:
            raise InputError(
                f"is {self.slots}; the tables of as many requests of {self.context:,} tokens take {tables >> 10} KiB, "
                f"and a TPU's kernel has room for {TABLES >> 10}: lower {{slots}} or {{context}}.",
                option="slots",
                others=["context"],
            )

    def _ready(self, state: RequestState) -> bool:
        changes = self._programs.changes
        if self._looked.get(state) == changes:
            return False
        self._looked[state] = changes
        needed = [Key("prefill images", (NARROW,))] if isinstance(state.prompt, ImagePrompt) else []
        ready = self._programs.ready([*self._needed, *needed])
        if ready:
            del self._looked[state]
        return ready

    @property
    def _needed(self) -> list[Key]:
        """The programs that every request needs, the one that takes longest first."""
        more = [] if self._drafts is None else self._drafts.needed
        if self.guessing is not None:
            name = "verify" if self._drafts is None else "verify drafts"
            more = [Key(name, (self.guessing.count,)), *more]
        return [Key("decode"), Key("prefill", (NARROW,)), *more, Key("first_token"), Key("insert"), Key("vacate")]

    def _compiled(self, key: Key) -> object:
        """The compiled program of a key."""
        if self._drafts is not None and key.name in Drafts.NAMES:
            return self._drafts.lowered(key).compile()
        return self.shapes.lowered(key, self.slots).compile()

    def programs(self) -> dict[str, int]:
        return self._programs.counts()

    def warm(self) -> None:
        self._programs.warm([*self._needed, *self._wide_programs])

    @property
    def _wide_programs(self) -> list[Key]:
        drafts = [] if self._drafts is None else [Key("draft prefill", (self._wide,))]
        images = [] if self.model.config.vision is None else [Key("prefill images", (self._wide,))]
        return [Key("prefill", (self._wide,)), *images, *drafts]

    def close(self) -> None:
        self._programs.close()

    def _wait(self) -> None:
        changes = self._programs.changes
        if self.blocked:
            self._programs.wait(changes)

    def _run(self, state: RequestState) -> Iterator[int | None]:
        text, row = state.text, state.row
        assert row is not None
        table, lengths = np.zeros((1, self._width), np.int32), np.array([len(text)], np.int32)
        table[0, : len(row.pages)] = row.pages
        last: Any = np.zeros((1, 1, self.model.config.hidden_size), self.model.model.norm.weight.dtype)
        begun = start = row.shared * self.pool.page
        if self._drafts is not None:
            self._drafts.begin(state)
        while start < len(text):
            if start > begun:
                yield None
            width = self._chunk(len(text) - start)
            ids, features = padded_inputs([chunk_inputs(self.model, state.prompt, text, start, start + width)], width)
            held = self.state.cache
            own = dataclasses.replace(held, table=table, lengths=np.array([start], np.int32))
            # The keys of an answer that gave up its pages are rotated as they were: each token by its own length.
            scaled = np.maximum(len(state.prompt), start + np.arange(width, dtype=np.int32) + 1)[None]
            cache, last = self.shapes.placed((own, last), self.shapes.row)
            adapters = self._adapters([state])
            cache, last = decoding.prefill(
                self.model, ids, cache, last, np.int32(start), lengths, scaled, adapters, features
            )
            self._keep(dataclasses.replace(self.state, cache=held.with_pool(cache)))
            start += width
            if self._drafts is not None:
                self._drafts.fill(state, min(start, len(text)), width)
        slot = self.rows.index(None)
        first = self._first_token(state, self.shapes.placed(last, self.shapes.row[1]))
        self._keep(insert(self.state, first, np.int32(slot), np.int32(len(text))))
        self.rows[slot], self._tables[slot] = state, table[0]
        self._score([(state, (0,))], first.scores)
        yield int(np.asarray(first.token)[0])

    def _chunk(self, left: int) -> int:
        """Tokens of the next chunk of a prompt. On a CPU, where a wide chunk takes seconds and is hardly more
        efficient, the answers of others do not wait for one."""
        waited_for = platform() == "cpu" and bool(self.running)
        if self._wide == NARROW or left <= self._wide // 2 or waited_for:
            return NARROW
        if all(map(self._programs.has, self._wide_programs)):
            return self._wide
        self._programs.warm(self._wide_programs)
        return NARROW

    def _first_token(self, state: RequestState, last: Array) -> State:
        """The row of a request, with its first token. The program does not get the cache, so it suits every length."""
        request, vocabulary = state.request, self.model.config.vocab_size
        found = sorted(request.end_ids)[:ENDS]
        eos_ids = np.array([found + [-1] * (ENDS - len(found))], np.int32)
        params = SamplingParams.of_rows([request.sampling], vocabulary, [request.logprobs is not None])
        rng = self._keys.pop(state.number, None)
        rng = request.sampling.row_keys(1) if rng is None else rng
        token_counts, nothing = count_tokens([penalized_ids(state.prompt)], vocabulary, [state.generated]), None
        state.look()
        forced = forced_steps([state.thought], 1)[0]
        allowed = allowed_rows([state.matcher], vocabulary)
        row = decoding.first_token(self.model, nothing, last, token_counts, rng, eos_ids, params, forced, allowed)
        return self.shapes.placed(row, self.shapes.state(1, False))

    def _keep(self, state: State) -> None:
        self.state = self.shapes.placed(state, self.shapes.state(self.slots))

    def _decode(self, steps: int) -> list[tuple[int, int]]:
        here = [(slot, row) for slot, row in enumerate(self.rows) if row is not None]
        for _, row in here:
            row.look()
            if row.thought is not None:
                steps = min(steps, row.thought.free)
            if row.matcher is not None:
                steps = 1
        self._place_tables()
        many, (params, allowed) = np.int32(min(steps, STEPS)), self._sampled()
        forced = forced_steps([row.thought if row else None for row in self.rows], STEPS)
        state, tokens, count, scores = decoding.decode(
            self.model, self.state, many, params, forced, allowed, self._adapters(self.rows)
        )
        self._keep(state)
        found = np.asarray(tokens)[: int(count)]
        self._score([(row, (step, slot)) for step in range(len(found)) for slot, row in here], scores)
        return [(row.number, int(step[slot])) for step in found for slot, row in here]

    def _speculated(self, guessing: Guessing[Model], room: int) -> list[tuple[int, list[int], int]] | None:
        plan = guessing.plan(self.rows, room)
        if plan is None:
            return None
        self._place_tables()
        proposed = None
        if self._drafts is not None:
            proposed = self._drafts.propose(self.rows, self._tables, self._chunk)
            proposed = self.shapes.placed(proposed, self.shapes.array(proposed.shape, proposed.dtype))
        params, allowed = self._sampled()
        state, tokens, right, scores = verify_rows(
            self.model, self.state, plan.given, proposed, params, plan.forced, allowed
        )
        self._keep(state)
        found, accepted = np.asarray(tokens), np.asarray(right)
        here = [(row, int(accepted[slot]) + 1, slot) for slot, row in enumerate(self.rows) if row is not None]
        self._score([(row, (step, slot)) for row, count, slot in here for step in range(count)], scores)
        made = []
        for slot, row in enumerate(self.rows):
            if row is not None:
                if self._drafts is not None:
                    self._drafts.accept(row, int(accepted[slot]) if plan.counts[slot] else 0)
                made.append((row.number, found[: accepted[slot] + 1, slot].tolist(), plan.counts[slot]))
        return made

    def _place_tables(self) -> None:
        """Take the pages that the rows got since the last step into the state."""
        for slot, row in enumerate(self.rows):
            if row is not None:
                assert row.row is not None
                self._tables[slot, : len(row.row.pages)] = row.row.pages
        cache = dataclasses.replace(self.state.cache, table=self._tables.copy())
        self._keep(dataclasses.replace(self.state, cache=cache))

    def _sampled(self) -> tuple[SamplingParams, np.ndarray]:
        """How each row is sampled, and the tokens that may come next, [B, V / 32]."""
        vocabulary = self.model.config.vocab_size
        samplings = [row.request.sampling if row else GREEDY for row in self.rows]
        scored = [row is not None and row.request.logprobs is not None for row in self.rows]
        params = SamplingParams.of_rows(samplings, vocabulary, scored)
        return params, allowed_rows([row.matcher if row else None for row in self.rows], vocabulary)

    def _score(self, made: Sequence[tuple[RequestState, tuple[int, ...]]], scores: Scores | None) -> None:
        """Give requests the scores of their new tokens, each with its place in ``scores``."""
        made = [(row, at) for row, at in made if row.request.logprobs is not None]
        if made and scores is not None:
            found = [np.asarray(values) for values in scores]
            for row, at in made:
                row.score(*(values[at] for values in found))

    def _restore(self, prefix: Prefix, row: Row) -> None:
        table, lengths = np.zeros((1, self._width), np.int32), np.zeros(1, np.int32)
        table[0, : len(row.pages)] = row.pages
        held = self.state.cache
        own = self.shapes.placed(dataclasses.replace(held, table=table, lengths=lengths), self.shapes.row[0])
        self._keep(dataclasses.replace(self.state, cache=held.with_pool(restore(self.model, own, prefix))))

    def stored(self, ids: Sequence[int]) -> CachedPrompt | None:
        pages, _ = self.pool.shared([*ids, 0])
        if not pages:
            return None
        return stored(self.model.config, self.state.cache.row_of(pages), len(pages) * self.pool.page)

    def _adapters(self, rows: Sequence[RequestState | None]) -> np.ndarray | None:
        """The adapter of each row."""
        if not self.model.adapters:
            return None
        return np.array([row.request.adapter if row else 0 for row in rows], np.int32)

    def _vacate(self, state: RequestState, again: bool) -> None:
        slot = self.rows.index(state)
        if self._drafts is not None:
            self._drafts.mark(state)
        if again:
            self._keys[state.number] = np.asarray(jax.random.key_data(self.state.rng))[slot : slot + 1]
        self.rows[slot], self._tables[slot] = None, 0
        self._keep(vacate(self.state, np.int32(slot)))


def page_size(model: Model, cache_options: CacheOptions) -> int:
    """Tokens of a page: the least power of two whose keys a TPU fetches at full bandwidth."""
    if cache_options.kv_bits is not None:
        return INT8_PAGE
    config = model.config
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    size, token = LEAST_PAGE, 2 * (latent if config.is_latent else config.num_key_value_heads * config.head_dim)
    while platform() == "tpu" and size * token < PAGE_BYTES:
        size *= 2
    return size
