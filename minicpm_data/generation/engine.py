"""Continuous batching: requests join and leave a running batch at any time.

The batch has ``slots`` rows, and the key/value cache is a pool of pages (`pages.PagePool`). A request is queued until a
slot and pages for its prompt are free. Its prompt is then prefilled in chunks, and between two chunks the running
requests decode a step. A prompt that begins like an earlier request shares the pages that are still cached. Each
request gets the tokens that it would get alone. The backends implement the computation.

Pages are given out as answers grow. Where none is left, the newest request gives up its pages and waits at the head of
the queue; its tokens so far are then prefilled like a prompt. The oldest request always goes on.

A backend that compiles programs for the shapes of a request compiles them beside the running requests. The request
stays in the queue until they are ready, and others may pass it.

With a `Speculation`, tokens are guessed and several are decoded in one run, where that is faster (`guessing`).

Requests may form a group, such as several answers to one question. A group never takes the last slot, and waiting
groups take turns.
"""

import itertools
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic

from minicpm_data.generation.beginnings import Beginnings
from minicpm_data.generation.guessing import FEW, Guessing
from minicpm_data.generation.options import PLAIN_CACHE, CacheOptions
from minicpm_data.generation.pages import PagePool, Row
from minicpm_data.generation.pool_size import check_prompt_cache, pinned, pool_of
from minicpm_data.generation.prompt_cache import CachedPrompt, Prefix, PromptCache
from minicpm_data.generation.request import GenerationRequest, ModelT
from minicpm_data.generation.request_state import GeneratedToken, RequestState
from minicpm_data.generation.speculation import Speculation
from weights_io.errors import InputError

SPARE = 0.05  # of the pages: left to the running answers when a request is admitted
MOST_STEPS = 32  # of a decode call: each running request gets pages for all of them before it
PATIENCE = 0.05  # seconds; a longer decode call would be visible in streamed text


class PromptTooLong(InputError):
    """Prompt and answer together are longer than the context."""


class BatchEngine(ABC, Generic[ModelT]):
    """The scheduler of a batch of requests; a backend's ``Engine`` implements the computation.

    It is not thread-safe; `minicpm_serve.engine.ServingEngine` is.
    """

    def __init__(
        self,
        model: ModelT,
        slots: int = 8,
        context: int | None = None,
        cache_options: CacheOptions = PLAIN_CACHE,
        cache_tokens: int | None = None,
        speculation: Speculation[ModelT] | None = None,
        prompt_cache: PromptCache | None = None,
    ):
        """
        Arguments:
            model: the backend's model.
            slots: concurrent requests.
            context: most tokens of a prompt and its answer; None: the model's ``max_position_embeddings``.
            cache_options: of every request's cache: unquantized, or 8 bits in JAX.
            cache_tokens: tokens for which there are pages; None: as the memory allows.
            speculation: the source of guesses; None: nothing is guessed.
            prompt_cache: a file of this model, whose keys and values stay in pages for prompts that begin with its
                text.

        Raises:
            InputError: a value is out of range, speculation or file do not suit the model, or the memory does not hold
                the cache of one request (`OutOfMemory`).
        """
        context = model.config.max_position_embeddings if context is None else context
        for name, value, least in (("slots", slots, 1), ("context", context, 2)):  # a prompt token and a new one
            if value != int(value) or value < least:
                raise InputError(f"is {value}; it must be a whole number, at least {least}.", option=name)
        self._pinned_tokens = 0 if prompt_cache is None else prompt_cache.length
        if cache_tokens is not None and cache_tokens < context + self._pinned_tokens:
            beside = f" beside the {self._pinned_tokens} of the prompt cache" if prompt_cache else ""
            raise InputError(
                f"is {cache_tokens}, and a request may have {{context}} {context}{beside}: raise it, or lower "
                "{context}.",
                option="cache_tokens",
                others=["context"],
            )
        if cache_options.max_kv_size is not None:
            raise InputError(
                "does not go with an engine, which keeps all keys and values; leave it out.", "max_kv_size"
            )
        self.model, self.slots, self.context, self.cache_options = model, slots, context, cache_options
        self.pool: PagePool  # of the backend
        self.queued: deque[RequestState] = deque()
        self.prefilling: tuple[RequestState, Iterator[int | None]] | None = None  # its prefill, chunk by chunk
        self.running: dict[int, RequestState] = {}
        # Called on any thread: when `blocked` may have ended; with the name of a compiled program and its seconds.
        self.wake: Callable[[], None] = lambda: None
        self.compiled: Callable[[str, float], None] = lambda name, seconds: None
        self._numbers = itertools.count()
        self._steps = 1
        self.preemptions = 0  # how often a request gave up its pages
        self.beginnings: Beginnings | None = None  # of the prompts, where somebody wants to know
        self.guessing: Guessing[ModelT] | None = None
        if speculation is not None and speculation.active:
            if model.adapters:
                raise InputError("do not go together with guessed tokens; leave one of them out.", "adapters")
            speculation.check_draft(model)
            self.guessing = Guessing(speculation)
        if prompt_cache is not None:
            check_prompt_cache(prompt_cache, self._rotates(prompt_cache.length))

    def _pool(
        self, page: int, bytes_of: Callable[[int], int], free: int | None, most: int, cache_tokens: int | None
    ) -> PagePool:
        """The pool of pages; arguments and errors as for `pool_of`."""
        return pool_of(page, bytes_of, free, most, self.context, cache_tokens, self._pinned_tokens)

    def _pin(self, file: PromptCache, whole: bool) -> Row:
        """Pages that hold the text of a file from now on. ``whole``: its whole pages alone."""
        row = pinned(file, self.pool, whole)
        self._restore(Prefix(file, self.pool.page * len(row.pages) if whole else file.length), row)
        return row

    def add(self, request: GenerationRequest) -> int:
        """Queue a request, and return its number. Raises `InputError` as `admitted` does."""
        state = self.admitted(request)
        self.queued.append(state)
        return state.number

    def group(self) -> int:
        """The id of a new group. Like `admitted`, this may be called from any thread."""
        return next(self._numbers)

    def admitted(self, request: GenerationRequest, group: int | None = None) -> RequestState:
        """The state of a new request, to be appended to ``queued``.

        Raises:
            PromptTooLong: prompt and answer do not fit the context.
            InputError: the request's cache options differ from the engine's, or the model has no such adapter.
        """
        if request.cache != self.cache_options:
            raise InputError("all requests of an engine share its cache_options; make the request with these.")
        if not 0 <= request.adapter <= (most := len(self.model.adapters)):
            raise InputError(f"is {request.adapter}; the model has {most} adapters, from 1 on.", option="adapter")
        self.check_context(len(request.prompt), request.max_tokens)
        number = next(self._numbers)
        return RequestState(number, request, number if group is None else group, number)

    def check_context(self, length: int, max_tokens: int) -> None:
        """Raises `PromptTooLong` where a prompt of ``length`` tokens and its answer do not fit the context."""
        if length + max_tokens > self.context:
            asked = f"a prompt of {length} tokens and {max_tokens} more"
            raise PromptTooLong(f"{asked} are above the {self.context} that there is room for.")

    def cancel(self, number: int) -> None:
        """Drop a request. Nothing happens if it is finished."""
        self.queued = deque(request for request in self.queued if request.number != number)
        if self.prefilling is not None and self.prefilling[0].number == number:
            self._release(self.prefilling[0])
            self.prefilling = None
        if number in self.running:
            self._end(self.running.pop(number))

    @property
    def idle(self) -> bool:
        """Whether there is no request."""
        return not self.queued and self.prefilling is None and not self.running

    @property
    def blocked(self) -> bool:
        """Whether there are requests, and all wait for programs."""
        return bool(self.queued) and self.prefilling is None and not self.running and self._next() is None

    def failed(self, number: int, error: Exception) -> None:
        """Called from `step` and `blocked` when a request is dropped because its programs could not be compiled; may be
        replaced. By default the error is raised."""
        raise error

    def programs(self) -> dict[str, int]:
        """How many programs are ``ready``, ``compiling`` and ``waiting``; empty in a backend that compiles none."""
        return {}

    def warm(self) -> None:
        """Begin to compile the programs of all requests that this engine admits, beside the running ones."""

    def close(self) -> None:
        """Stop compiling. A program that is being compiled is waited for."""

    def step(self) -> list[GeneratedToken]:
        """Prefill one chunk of the next prompt, if there is a slot and pages for it, or else decode; returns the new
        tokens. If all requests are `blocked`, it first waits for a program."""
        if self.blocked:
            self._wait()
        if self.prefilling is None and (chosen := self._next()) is not None:
            chosen.row = self.pool.take(*self._wanted(chosen))
            self.queued.remove(chosen)
            for request in self.queued:
                if request.group == chosen.group:
                    request.turn = next(self._numbers)
            self.prefilling = chosen, self._run(chosen)
            if self.beginnings is not None and not chosen.generated:
                self.beginnings.add(chosen.prompt)
        if self.prefilling is not None:
            state, pieces = self.prefilling
            token = next(pieces)
            if token is not None:  # the prefill is complete
                self.prefilling = None
                self.running[state.number] = state
                self._name(state, state.text)
                return [self._record(state, token)]
        return self._decoded() if self.running else []

    def _decoded(self) -> list[GeneratedToken]:
        """Decode, with guesses where that is faster."""
        guessing, running = self.guessing, len(self.running)
        if guessing is None:
            return self._plain()
        before, began = guessing.drafted, time.perf_counter()
        generated = self._guessed(guessing) if guessing.pace.pays(running) else self._plain()
        if generated is None:  # nothing is guessed
            generated = self._plain(FEW)
        guessing.pace.record(running, guessing.drafted > before, len(generated), time.perf_counter() - began)
        return generated

    def _guessed(self, guessing: Guessing[ModelT]) -> list[GeneratedToken] | None:
        """Decode one run of guesses; None where there is none."""
        found = self._speculated(guessing, self._room(guessing.count + 1) - 1)
        if found is None:
            return None
        generated = []
        for number, tokens, guesses in found:
            guessing.count_run(guesses, len(tokens))
            for token in tokens:
                if number in self.running:  # else the request finished a few tokens earlier
                    generated.append(self._record(self.running[number], token))
        return generated

    def _plain(self, most: int = MOST_STEPS) -> list[GeneratedToken]:
        """Decode as many steps, at most ``most``, as are quick and have pages."""
        held = any(state.matcher for state in self.running.values())  # looks at each token
        hurry = held or self.prefilling is not None or self._next() is not None
        left = min(state.left for state in self.running.values())
        wanted = max(1, min(1 if hurry else self._steps, left, most))
        steps = self._room(wanted)
        began = time.perf_counter()
        generated = [
            self._record(self.running[number], token)
            for number, token in self._decode(steps)
            if number in self.running  # else the request finished a few steps earlier
        ]
        if steps == self._steps and not hurry:
            fast = time.perf_counter() - began < PATIENCE / 2
            self._steps = min(2 * steps, MOST_STEPS) if fast else max(1, steps // 2)
        return generated

    def _room(self, steps: int) -> int:
        """Give every running request pages for up to ``steps`` more tokens, and return for how many. Where there are
        too few, the newest requests give up theirs."""
        while True:
            held = [(state, len(state.prompt) + len(state.generated) - 1) for state in self.running.values()]
            for count in (steps >> i for i in range(steps.bit_length())):
                wanted = [(state.row, self.pool.needed(cached + min(count, state.left))) for state, cached in held]
                if sum(max(0, pages - len(row.pages)) for row, pages in wanted if row) <= self.pool.available:
                    for row, pages in wanted:
                        assert row is not None
                        self.pool.extend(row, pages)
                    return count
            if not self._give_back():
                self._preempt()

    def _preempt(self) -> None:
        """Take the pages of the newest request, and queue it again."""
        newest = max(self.running)
        if self.prefilling is not None and self.prefilling[0].number > newest:
            state, self.prefilling = self.prefilling[0], None
        else:
            state = self.running.pop(newest)
            self._name(state, state.text[:-1])
            self._vacate(state, again=True)
        self._release(state)
        self.queued.appendleft(state)
        self.preemptions += 1

    def _next(self) -> RequestState | None:
        """The queued request that is next, if a slot and pages are free for it and its programs are ready."""
        if len(self.running) >= self.slots or not self.queued:
            return None
        taken = Counter(request.group for request in self.running.values())
        for request in sorted(self.queued, key=lambda request: (taken[request.group], request.turn)):
            if taken[request.group] >= max(1, self.slots - 1):
                return None
            try:
                if self._ready(request):
                    while not (fits := self.pool.fits(*self._wanted(request))) and self._give_back():
                        pass
                    return request if fits else None
            except Exception as error:
                self.queued.remove(request)
                self.failed(request.number, error)
        return None

    def _wanted(self, state: RequestState) -> tuple[Sequence[int], bool, int, int]:
        """The arguments of `PagePool.take` for a request. Some pages are left to the running answers."""
        spare = int(SPARE * self.pool.pages) + 1 if self.running else 0
        return state.text, self._shares(state, len(state.text)), spare, -state.request.adapter

    def _shares(self, state: RequestState, length: int) -> bool:
        """Whether the first ``length`` tokens of a request have the keys of every text that begins so: dynamic NTK and
        LongRoPE rotate the keys of a long prompt, and those behind a length, in another way."""
        return not self._rotates(max(length, len(state.prompt)))

    def _rotates(self, length: int) -> bool:
        """Whether RoPE is scaled for the length of a text so long."""
        scaling = self.model.config.rope_scaling
        return scaling is not None and scaling.grows(self.model.config.max_position_embeddings, length)

    def _name(self, state: RequestState, text: Sequence[int]) -> None:
        """Others may share the pages of this text, which is in the cache."""
        assert state.row is not None
        if self._shares(state, len(text)):
            self.pool.name(state.row, text)

    def _release(self, state: RequestState) -> None:
        assert state.row is not None
        self.pool.release(state.row)
        state.row = None

    def _end(self, state: RequestState) -> None:
        """A running request ends. Its last token is not in the cache."""
        self._name(state, state.text[:-1])
        self._vacate(state, again=False)
        self._release(state)

    def _give_back(self) -> bool:
        """Release pages that no request holds, where the backend keeps some; whether there were any."""
        return False

    def _ready(self, state: RequestState) -> bool:
        """Whether the programs of a request are ready; otherwise they are being compiled. Raises the error of one that
        could not be compiled."""
        return True

    def _wait(self) -> None:
        """Wait until `blocked` may have ended."""

    def _record(self, state: RequestState, token: int) -> GeneratedToken:
        state.generated.append(token)
        if state.finished:
            self._end(self.running.pop(state.number))
        score = state.scores.popleft() if state.scores else None
        return GeneratedToken(state.number, token, state.finished, score)

    @abstractmethod
    def _run(self, state: RequestState) -> Iterator[int | None]:
        """Prefill the text of a request into its pages and give it a slot. Yields None after each chunk but the last,
        and then the first token."""

    @abstractmethod
    def _decode(self, steps: int) -> list[tuple[int, int]]:
        """Decode up to ``steps`` steps, for which all running requests have pages. Returns (request number, token)
        pairs in order."""

    def _speculated(self, guessing: Guessing[ModelT], room: int) -> list[tuple[int, list[int], int]] | None:
        """Run the last token of all running requests and their guesses, at most ``room``, for which they have pages.
        Returns (request number, tokens, guesses) of each; None where nothing is guessed."""
        raise NotImplementedError

    def _restore(self, prefix: Prefix, row: Row) -> None:
        """Write the keys and values of a file into the pages of a row."""
        raise NotImplementedError

    def stored(self, ids: Sequence[int]) -> CachedPrompt | None:
        """The keys and values of the longest beginning of a text that is in the cache; None without any. It is read
        while no other call is made."""
        raise NotImplementedError

    @abstractmethod
    def _vacate(self, state: RequestState, again: bool) -> None:
        """Free the slot of a request. ``again``: it will go on later, with the same random numbers."""
