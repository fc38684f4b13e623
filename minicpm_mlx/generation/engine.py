"""`minicpm_data.generation.engine` with an `mlx_lm` cache for each request.

A prompt is prefilled in a cache of its own, which no other request's joining or leaving copies. The pages of the pool
only count what the caches hold. The caches of finished requests are kept for prompts that begin alike, until their
memory is needed.

The graph of a step is built and submitted before the tokens of the step before it are read.

Dims: B running requests, V vocabulary.
"""

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import trim_prompt_cache

from minicpm_data.generation import engine
from minicpm_data.generation.constraint import unpacked
from minicpm_data.generation.options import PLAIN_CACHE, CacheOptions, seen_tokens
from minicpm_data.generation.pages import Row as Pages
from minicpm_data.generation.request_state import RequestState
from minicpm_mlx import device
from minicpm_mlx.generation import decoding
from minicpm_mlx.generation.sampling import sample
from minicpm_mlx.layers.fused_linear import fuse
from minicpm_mlx.layers.row_caches import RowCaches
from minicpm_mlx.layers.row_lora import adapter_rows
from minicpm_mlx.model import Model
from weights_io.errors import InputError

PAGE = 256  # tokens by which a cache of `mlx_lm` grows
LEAST_SHARED = 16  # tokens; a copy of a cache for fewer does not pay
SHARE = 0.8  # of the free memory, for caches: a copy of one, and a step's activations, need the rest


@dataclass(eq=False)
class Row:
    """A running request.

    Attributes:
        state: the request.
        cache: its caches, one per layer.
        token: [1] the last token that was given out, not yet in the cache.
        key: [2] its random key after that token.
        token_mask: [1, V] the tokens so far, where they are penalized.
        ahead: what is being computed: the values of ``token``, ``key`` and ``token_mask`` after the next token.
    """

    state: RequestState
    cache: list[Any]
    token: mx.array
    key: mx.array
    token_mask: mx.array | None
    ahead: tuple[mx.array, mx.array, mx.array | None] | None = None


class Engine(engine.BatchEngine[Model]):
    def __init__(
        self,
        model: Model,
        slots: int = 8,
        context: int | None = None,
        cache_options: CacheOptions = PLAIN_CACHE,
        cache_tokens: int | None = None,
    ):
        super().__init__(model, slots, context, cache_options, cache_tokens)
        if cache_options.kv_bits is not None:
            raise InputError("is for one prompt at a time in MLX; leave it out for an engine.", option="kv_bits")
        fuse(model)
        mx.eval(model.parameters())  # lazy weights can only be read by the loading thread

        def bytes_of(pages: int) -> int:
            return decoding.cache_bytes(model, 1, pages * PAGE, cache_options)

        most = (slots + 1) * self.context  # one more for those that are kept
        free = device.free_memory(model)
        self.pool = self._pool(PAGE, bytes_of, None if free is None else int(SHARE * free), most, cache_tokens)
        self.rows: list[Row] = []
        self._keys: dict[int, mx.array] = {}  # random keys of requests that gave up their pages
        # Text, caches, pages and adapter of finished requests.
        self.kept: deque[tuple[Sequence[int], list[Any], Pages, int]] = deque()

    def _shares(self, state: RequestState, length: int) -> bool:
        return False  # a cache has no pages that another could hold

    def _run(self, state: RequestState) -> Iterator[int | None]:
        request, text, cache = state.request, state.text, self._begun(state)
        begun, width = cache[0].offset, request.cache.prefill_step_size
        for start in range(begun, len(text), width):
            if start > begun:
                yield None
            part = text[start : start + width]
            # The keys of an answer that gave up its memory are rotated as they were: each token by its own length.
            scaled = np.maximum(len(state.prompt), start + np.arange(len(part)) + 1)[None]
            length = len(state.prompt) if start + len(part) <= len(state.prompt) else mx.array(scaled)
            with adapter_rows(self._adapters([state])):
                hidden = decoding.prefill_chunks(self.model, mx.array([part]), cache, len(part), length)
        key = self._keys.pop(state.number, None)
        key = mx.array(request.sampling.row_keys(1)[0]) if key is None else key
        seen = mx.array(seen_tokens([text], self.model.config.vocab_size)) if request.sampling.penalized else None
        row = Row(state, cache, mx.array([text[-1]]), key, seen)
        self._sample([row], self.model.head(hidden)[:, 0])
        self._advance(row)
        self.rows.append(row)
        yield int(np.asarray(row.token)[0])

    def _begun(self, state: RequestState) -> list[Any]:
        """A cache that already holds the longest prefix which the text shares with a kept one."""
        text, best, found = state.text, 0, None
        if super()._shares(state, len(text)):
            for kept, cache, _, adapter in self.kept:
                if adapter != state.request.adapter:
                    continue
                most = min(len(text) - 1, len(kept))
                same = next((i for i in range(most) if text[i] != kept[i]), most)
                best, found = (same, cache) if same > max(best, LEAST_SHARED - 1) else (best, found)
        if found is None:
            return decoding.make_cache(self.model, [0], self.cache_options)
        cache = copy.deepcopy(found)
        trim_prompt_cache(cache, cache[0].offset - best)
        return cache

    def _decode(self, steps: int) -> list[tuple[int, int]]:
        if all(row.ahead is None for row in self.rows):
            self._submit()
        made = [row for row in self.rows if row.ahead is not None]
        for row in made:
            self._advance(row)
        if not any(row.state.looks for row in self.rows):
            self._submit()
        return [(row.state.number, int(np.asarray(row.token)[0])) for row in made]

    def _submit(self) -> None:
        """Submit a step of all rows."""
        caches = [RowCaches([row.cache[layer] for row in self.rows]) for layer in range(len(self.model.layers))]
        ids = mx.concatenate([row.token for row in self.rows])[:, None]
        with adapter_rows(self._adapters([row.state for row in self.rows])):
            hidden = self.model.decode(ids, caches)
        self._sample(self.rows, self.model.head(hidden)[:, 0])
        mx.async_eval([row.ahead for row in self.rows])

    def _sample(self, rows: list[Row], logits: mx.array) -> None:
        """Sample the token after ``row.token`` in each row, from logits [B, V]. Greedy rows are sampled at once."""
        greedy = mx.argmax(logits, axis=-1)
        for i, row in enumerate(rows):
            state, sampling, key, seen = row.state, row.state.request.sampling, row.key, row.token_mask
            state.look()
            token, own = greedy[i : i + 1], logits[i : i + 1]
            if state.matcher is not None:
                own = mx.where(mx.array(unpacked(state.matcher.allowed(), own.shape[-1])), own, -mx.inf)
            if not sampling.greedy:
                key, draw = mx.random.split(row.key)
                token = sample(own, seen, sampling, draw[None])
            elif sampling.penalized or state.matcher is not None:
                token = sample(own, seen, sampling, None)
            if state.thought is not None and state.thought.forced:
                token = mx.array(state.thought.forced[:1])
            if seen is not None:
                seen = mx.put_along_axis(seen, token[:, None], mx.array(True), axis=1)
            row.ahead = token, key, seen

    def _advance(self, row: Row) -> None:
        assert row.ahead is not None
        (row.token, row.key, row.token_mask), row.ahead = row.ahead, None

    def _adapters(self, rows: Sequence[RequestState]) -> mx.array | None:
        """The adapter of each row; None where no row has one."""
        found = [row.request.adapter for row in rows]
        return mx.array(found) if any(found) else None

    def _vacate(self, state: RequestState, again: bool) -> None:
        row = next(row for row in self.rows if row.state is state)
        self.rows.remove(row)
        if again:
            self._keys[state.number] = row.key
        text = state.text[:-1]
        trim_prompt_cache(row.cache, row.cache[0].offset - len(text))  # a step ahead
        assert state.row is not None
        pages = self.pool.fork(state.row)
        self.kept.append((text, row.cache, pages, state.request.adapter))

    def _give_back(self) -> bool:
        if not self.kept:
            return False
        self.pool.release(self.kept.popleft()[2])
        return True
