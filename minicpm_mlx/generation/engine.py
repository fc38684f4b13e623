"""`minicpm_data.generation.engine` with an `mlx_lm` cache for each request.

A prompt is prefilled in a cache of its own, which no other request's joining or leaving copies. The pages of the pool
only count what the caches hold. The caches of finished requests are kept for prompts that begin alike, until their
memory is needed.

The graph of a step is built and submitted before the tokens of the step before it are read. Where tokens are guessed, a
run waits for the one before it. A draft model has a cache for each request too.

Dims: B running requests, K guesses, W = K + 1, V vocabulary.
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
from minicpm_data.generation.guessing import NONE, PROPOSED, Guessing
from minicpm_data.generation.image_prompt import chunk_inputs, penalized_ids
from minicpm_data.generation.options import IN_ANSWER, PLAIN_CACHE, CacheOptions, count_tokens
from minicpm_data.generation.pages import Row as Pages
from minicpm_data.generation.prompt_cache import AGAIN, CachedPrompt, Prefix, PromptCache
from minicpm_data.generation.request import text_ids
from minicpm_data.generation.request_state import RequestState
from minicpm_data.generation.speculation import Speculation
from minicpm_mlx import device
from minicpm_mlx.generation import decoding
from minicpm_mlx.generation.prompt_cache import restore, stored
from minicpm_mlx.generation.sampling import Scores, sample, score
from minicpm_mlx.layers.fused_linear import fuse
from minicpm_mlx.layers.row_caches import RowCaches
from minicpm_mlx.layers.row_lora import adapter_rows
from minicpm_mlx.model import Model
from weights_io.errors import InputError

PAGE = 256  # tokens by which a cache of `mlx_lm` grows
LEAST_SHARED = 16  # tokens; a copy of a cache for fewer does not pay
LAST = (
    2  # tokens that a draft model runs before it guesses: the last accepted guess was not run, and a token came after
)
SHARE = 0.8  # of the free memory, for caches: a copy of one, and a step's activations, need the rest


@dataclass(eq=False)
class Row:
    """A running request.

    Attributes:
        state: the request.
        cache: its caches, one per layer.
        token: [1] the last token that was given out, not yet in the cache.
        key: [2] its random key after that token.
        token_counts: [1, V] from `count_tokens`, where they are penalized.
        draft: the draft model's caches; they may hold less than the text.
        ahead: what is being computed: the values of ``token``, ``key``, ``token_counts`` and ``scores`` after the next
            token.
        scores: of ``token``, where the request asks for them.
    """

    state: RequestState
    cache: list[Any]
    token: mx.array
    key: mx.array
    token_counts: mx.array | None
    draft: list[Any] | None = None
    ahead: tuple[mx.array, mx.array, mx.array | None, Scores | None] | None = None
    scores: Scores | None = None


@dataclass(frozen=True, eq=False)
class Kept:
    """The caches of a finished request, or of a file.

    Attributes:
        text: what they hold.
        cache, draft: as in `Row`.
        pages: count what they hold.
        adapter: with which they were computed; 0: none.
    """

    text: Sequence[int]
    cache: list[Any]
    draft: list[Any] | None
    pages: Pages
    adapter: int = 0


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
        if cache_options.kv_bits is not None:
            raise InputError("is for one prompt at a time in MLX; leave it out for an engine.", option="kv_bits")
        self._draft_model = None if self.guessing is None else self.guessing.draft_model
        both = [model] if self._draft_model is None else [model, self._draft_model]
        for each in both:
            fuse(each)
            mx.eval(each.parameters())  # lazy weights can only be read by the loading thread

        def bytes_of(pages: int) -> int:
            return sum(decoding.cache_bytes(each, 1, pages * PAGE, cache_options) for each in both)

        most = (slots + 1) * self.context  # one more for those that are kept
        free = device.free_memory(model)
        self.pool = self._pool(PAGE, bytes_of, None if free is None else int(SHARE * free), most, cache_tokens)
        self.rows: list[Row] = []
        self._keys: dict[int, mx.array] = {}  # random keys of requests that gave up their pages
        self.kept: deque[Kept] = deque()  # of finished requests, the oldest first
        self.pinned: list[Kept] = []  # never given back
        if prompt_cache is not None:
            self._pin(prompt_cache, whole=False)

    def _shares(self, state: RequestState, length: int) -> bool:
        return False  # a cache has no pages that another could hold

    def _run(self, state: RequestState) -> Iterator[int | None]:
        request, text, (cache, draft) = state.request, state.text, self._begun(state)
        begun, width = cache[0].offset, request.cache.prefill_step_size
        for start in range(begun, len(text), width):
            if start > begun:
                yield None
            part, features = chunk_inputs(self.model, state.prompt, text, start, start + width)
            # The keys of an answer that gave up its memory are rotated as they were: each token by its own length.
            scaled = np.maximum(len(state.prompt), start + np.arange(len(part)) + 1)[None]
            length = len(state.prompt) if start + len(part) <= len(state.prompt) else mx.array(scaled)
            with adapter_rows(self._adapters([state])):
                seen = None if features is None else mx.array(features[None])
                ids = mx.array(part[None])
                hidden = decoding.prefill_chunks(self.model, ids, cache, len(part), length, features=seen)
        key = self._keys.pop(state.number, None)
        key = mx.array(request.sampling.row_keys(1)[0]) if key is None else key
        counts = None
        if request.sampling.penalized:
            counted = [penalized_ids(state.prompt)]
            counts = mx.array(count_tokens(counted, self.model.config.vocab_size, [state.generated]))
        row = Row(state, cache, mx.array([text[-1]]), key, counts, draft)
        if draft is not None:
            self._fill(draft, text, len(state.prompt), len(text))
        self._sample([row], self.model.head(hidden)[:, 0])
        self._advance(row)
        self.rows.append(row)
        _score(state, row.scores)
        yield int(np.asarray(row.token)[0])

    def _begun(self, state: RequestState) -> tuple[list[Any], list[Any] | None]:
        """Caches that already hold the longest prefix which the text shares with a kept one, and those of the draft
        model."""
        text, best, found = state.text, 0, None
        if super()._shares(state, len(text)):
            for kept in (*self.pinned, *self.kept):
                if kept.adapter != state.request.adapter:
                    continue
                most = min(len(text) - 1, len(kept.text))
                same = next((i for i in range(most) if text[i] != kept.text[i]), most)
                best, found = (same, kept) if same > max(best, LEAST_SHARED - 1) else (best, found)
        draft = None if found is None else found.draft
        if draft is None and self._draft_model is not None:
            draft = decoding.make_cache(self._draft_model, [0], self.cache_options)
        cache = decoding.make_cache(self.model, [0], self.cache_options) if found is None else found.cache
        return _beginning(cache, best), None if draft is None else _beginning(draft, best)

    def _fill(self, draft: list[Any], text: Sequence[int], prompt: int, upto: int) -> None:
        """Run what is missing of the first ``upto`` tokens of a text through the draft model. ``prompt``: tokens of
        the prompt at its beginning."""
        assert self._draft_model is not None
        width = self.cache_options.prefill_step_size
        for start in range(draft[0].offset, upto, width):
            part = text_ids(text[start : min(start + width, upto)])
            scaled = mx.array(np.maximum(prompt, start + np.arange(len(part)) + 1)[None])
            decoding.prefill_chunks(self._draft_model, mx.array([part]), draft, len(part), scaled)

    def _decode(self, steps: int) -> list[tuple[int, int]]:
        if all(row.ahead is None for row in self.rows):
            self._submit()
        made = [row for row in self.rows if row.ahead is not None]
        for row in made:
            self._advance(row)
        if not any(row.state.looks for row in self.rows):
            self._submit()
        for row in made:
            _score(row.state, row.scores)
        return [(row.state.number, int(np.asarray(row.token)[0])) for row in made]

    def _speculated(self, guessing: Guessing[Model], room: int) -> list[tuple[int, list[int], int]] | None:
        if ahead := [row for row in self.rows if row.ahead is not None]:  # of plain decoding
            for row in ahead:
                self._advance(row)
                _score(row.state, row.scores)
            return [(row.state.number, [int(np.asarray(row.token)[0])], 0) for row in ahead]
        plan = guessing.plan([row.state for row in self.rows], room)
        if plan is None:
            return None
        given = plan.given[:, : int((plan.given != NONE).sum(axis=1).max())]
        guesses = mx.array(np.maximum(given, 0))
        if self._draft_model is not None:
            guesses = mx.where(mx.array(given == PROPOSED), self._propose(self._draft_model, given.shape[1]), guesses)
        runs = self._verified(guesses, plan.forced)
        made: Any = mx.stack([mx.concatenate([token for token, *_ in run]) for run in runs], axis=1)
        mx.eval(made, guesses)
        tokens, count = np.asarray(made), given.shape[1]
        right = np.cumprod(np.where(given == NONE, NONE, np.asarray(guesses)) == tokens[:, :-1], axis=1).sum(axis=1)
        found = []
        for index, (row, accepted, guessed) in enumerate(zip(self.rows, map(int, right), plan.counts, strict=True)):
            row.token, row.key, row.token_counts, row.scores = runs[accepted][index]
            for run in runs[: accepted + 1]:
                _score(row.state, run[index][3])
            trim_prompt_cache(row.cache, count - accepted)
            if row.draft is not None:  # the last guess was not run; a row without guesses has them in its draft too
                trim_prompt_cache(row.draft, max(0, count - 1 - (accepted if guessed else 0)))
            found.append((row.state.number, tokens[index, : accepted + 1].tolist(), guessed))
        return found

    def _verified(self, guesses: mx.array, forced: np.ndarray) -> list[list[tuple[Any, ...]]]:
        """Run the last token of each row and its guesses [B, K] through the model. Returns, after each of the W, what
        `Row.ahead` holds of each row. ``forced``: [W, B], as in `_sample`."""
        ids = mx.concatenate([mx.stack([row.token for row in self.rows]).astype(mx.int32), guesses], axis=1)
        caches = self._caches(self.model, [row.cache for row in self.rows])
        logits = self.model.head(self.model.decode(ids, caches, _lengths(caches[0], ids.shape[1])))  # [B, W, V]
        runs = []
        for index in range(ids.shape[1]):
            self._sample(self.rows, logits[:, index], forced[index])
            for row in self.rows:
                self._advance(row)
            runs.append([(row.token, row.key, row.token_counts, row.scores) for row in self.rows])
        return runs

    def _propose(self, model: Model, count: int) -> mx.array:
        """[B, K] guesses of the draft model after each row's text, of which it runs the last two tokens again."""
        for row in self.rows:
            assert row.draft is not None
            begun = len(row.state.text) - LAST
            self._fill(row.draft, row.state.text, len(row.state.prompt), begun)
            trim_prompt_cache(row.draft, row.draft[0].offset - begun)
        caches = self._caches(model, [row.draft for row in self.rows if row.draft is not None])
        ids = mx.array([row.state.text[-LAST:] for row in self.rows])
        found: list[mx.array] = []
        while len(found) < count:
            hidden = model.decode(ids, caches, _lengths(caches[0], ids.shape[1]), last=True)
            found.append(mx.argmax(model.head(hidden)[:, 0], axis=-1))
            ids = found[-1][:, None]
        return mx.stack(found, axis=1).astype(mx.int32)

    def _caches(self, model: Model, rows: Sequence[list[Any]]) -> list[RowCaches]:
        return [RowCaches([row[layer] for row in rows]) for layer in range(len(model.layers))]

    def _submit(self) -> None:
        """Submit a step of all rows."""
        caches = self._caches(self.model, [row.cache for row in self.rows])
        ids = mx.concatenate([row.token for row in self.rows])[:, None]
        with adapter_rows(self._adapters([row.state for row in self.rows])):
            hidden = self.model.decode(ids, caches)
        self._sample(self.rows, self.model.head(hidden)[:, 0])
        mx.async_eval([row.ahead for row in self.rows])

    def _sample(self, rows: list[Row], logits: mx.array, forced: Sequence[int] | np.ndarray | None = None) -> None:
        """Sample the token after ``row.token`` in each row, from logits [B, V]. Greedy rows are sampled at once.
        ``forced``: [B] ids to take in place of a sampled one, or -1; None: those of the thoughts."""
        greedy = mx.argmax(logits, axis=-1)
        for i, row in enumerate(rows):
            state, sampling, key, counts = row.state, row.state.request.sampling, row.key, row.token_counts
            state.look()
            token, own = greedy[i : i + 1], logits[i : i + 1]
            if state.matcher is not None:
                own = mx.where(mx.array(unpacked(state.matcher.allowed(), own.shape[-1])), own, -mx.inf)
            if not sampling.greedy:
                key, draw = mx.random.split(row.key)
                token = sample(own, counts, sampling, draw[None])
            elif sampling.penalized or state.matcher is not None:
                token = sample(own, counts, sampling, None)
            if forced is None and state.thought is not None and state.thought.forced:
                token = mx.array(state.thought.forced[:1])
            elif forced is not None and forced[i] >= 0:
                token = mx.array([int(forced[i])])
            if counts is not None:
                counts = counts.at[mx.arange(1), token].add(IN_ANSWER)
            scores = None if state.request.logprobs is None else score(logits[i : i + 1], token)
            row.ahead = token, key, counts, scores

    def _advance(self, row: Row) -> None:
        assert row.ahead is not None
        (row.token, row.key, row.token_counts, row.scores), row.ahead = row.ahead, None

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
        if row.draft is not None:
            trim_prompt_cache(row.draft, max(0, row.draft[0].offset - len(text)))
        assert state.row is not None
        pages = self.pool.fork(state.row)
        self.kept.append(Kept(text, row.cache, row.draft, pages, state.request.adapter))

    def _give_back(self) -> bool:
        if not self.kept:
            return False
        self.pool.release(self.kept.popleft().pages)
        return True

    def stored(self, ids: Sequence[int]) -> CachedPrompt | None:
        best, found = 0, None
        for kept in (*self.pinned, *self.kept):
            same = next(
                (i for i, (one, own) in enumerate(zip(ids, kept.text, strict=False)) if one != own),
                min(len(ids), len(kept.text)),
            )
            best, found = (same, kept) if same > best else (best, found)
        return None if found is None else stored(self.model.config, found.cache, best)

    def _restore(self, prefix: Prefix, row: Pages) -> None:
        if prefix.bits is not None:
            raise InputError(f"{prefix.source.path} is quantized, and an engine of MLX keeps whole keys; {AGAIN}.")
        ids = prefix.source.ids[: prefix.length]
        cache = restore(self.model, decoding.make_cache(self.model, [0], self.cache_options), prefix)
        draft = None
        if self._draft_model is not None:
            draft = decoding.make_cache(self._draft_model, [0], self.cache_options)
            self._fill(draft, ids, len(ids), len(ids))
        self.pinned.append(Kept(ids, cache, draft, row))


def _score(state: RequestState, scores: Scores | None) -> None:
    """Give a request the scores of its new token."""
    if scores is not None:
        state.score(*(np.asarray(values)[0] for values in scores))


def _beginning(cache: list[Any], length: int) -> list[Any]:
    """A copy of caches, with at most their first ``length`` tokens."""
    copied = copy.deepcopy(cache)
    trim_prompt_cache(copied, max(0, copied[0].offset - length))
    return copied


def _lengths(cache: RowCaches, width: int) -> mx.array:
    """[B, T] the length at each of the next tokens, as in plain decoding: dynamic NTK and LongRoPE depend on it."""
    return cache.offset[:, None] + 1 + mx.arange(width)
