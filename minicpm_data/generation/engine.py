"""Continuous batching: requests join and leave a running batch at any time.

The batch has ``slots`` rows. A request is queued until a slot is free. Its prompt is then prefilled in chunks, and
between two chunks the running requests decode a step. A prompt that shares a prefix with an earlier request reuses the
keys and values that are still cached. Each request gets the tokens that it would get alone. The backends implement the
computation.

A backend that compiles programs for the shapes of a request compiles them beside the running requests. The request
stays in the queue until they are ready, and others may pass it.

Requests may form a group, such as several answers to one question. A group never takes the last slot, and waiting
groups take turns.
"""

import bisect
import itertools
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic

from minicpm_data.generation.constraint import Matcher
from minicpm_data.generation.options import PLAIN_CACHE, CacheOptions
from minicpm_data.generation.request import GenerationRequest, ModelT, PromptIds
from minicpm_data.generation.thinking import Thought
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.memory import no_room

STEP = 256  # tokens; a context that does not fit memory is shortened to a multiple of this
LEAST_SHARED = 16  # tokens; copying the keys and values of a shorter shared prefix does not pay
PATIENCE = 0.05  # seconds; a longer decode call would be visible in streamed text


class PromptTooLong(InputError):
    """Prompt and answer together are longer than the context."""


class OutOfMemory(InputError):
    """The memory does not hold the key/value cache.

    ``context``: the longest context that fits with the same number of slots; None if none fits.
    """

    def __init__(self, sentence: str, context: int | None):
        super().__init__(sentence, others=["slots", "context"])
        self.context = context


@dataclass(eq=False)
class RequestState:
    """A request in the engine, with the tokens generated so far.

    Attributes:
        number: its id.
        request: what was asked; exactly one prompt.
        group: the id of its group; its own number where it has none.
        turn: order in the queue among groups that hold equally many slots; the lowest is next.
        generated: the token ids so far.
        thought: the thought, where the request has a thinking budget.
        matcher: the state of its constraint, where it has one.
    """

    number: int
    request: GenerationRequest
    group: int
    turn: int
    generated: list[int] = field(default_factory=list)
    thought: Thought | None = field(init=False, default=None)
    matcher: Matcher | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if (budget := self.request.thinking) is not None:
            self.thought = Thought(budget, *budget.opened)
        if (constraint := self.request.constraint) is not None:
            self.matcher = constraint.begin()

    @property
    def prompt(self) -> PromptIds:
        return self.request.prompt

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return self.request.max_tokens - len(self.generated)

    @property
    def finished(self) -> bool:
        return self.left == 0 or bool(self.generated and self.generated[-1] in self.request.end_ids)


@dataclass(frozen=True)
class GeneratedToken:
    """A token of the request with this number. ``last``: the request is finished."""

    number: int
    token: int
    last: bool


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
    ):
        """
        Arguments:
            model: the backend's model.
            slots: concurrent requests.
            context: most tokens of a prompt and its answer; None: the model's ``max_position_embeddings``.
            cache_options: of every request's cache: unquantized, or 8 bits in JAX.

        Raises:
            InputError: a value is out of range, or the memory does not hold the caches (`OutOfMemory`).
        """
        context = model.config.max_position_embeddings if context is None else context
        for name, value, least in (("slots", slots, 1), ("context", context, 2)):  # a prompt token and a new one
            if value != int(value) or value < least:
                raise InputError(f"is {value}; it must be a whole number, at least {least}.", option=name)
        if cache_options.max_kv_size is not None:
            raise InputError(
                "does not go with an engine, which keeps all keys and values; leave it out.", "max_kv_size"
            )
        self.model, self.slots, self.context, self.cache_options = model, slots, context, cache_options
        self.queued: deque[RequestState] = deque()
        self.prefilling: tuple[RequestState, Iterator[None]] | None = None  # its prefill, chunk by chunk
        self.running: dict[int, RequestState] = {}
        # Called on any thread: when `blocked` may have ended; with the name of a compiled program and its seconds.
        self.wake: Callable[[], None] = lambda: None
        self.compiled: Callable[[str, float], None] = lambda name, seconds: None
        self._numbers = itertools.count()
        self._steps = 1

    def _check_room(self, needed: Callable[[int], int], free: int | None) -> None:
        """Raises `OutOfMemory` where the caches do not fit.

        Arguments:
            needed: context -> bytes of all caches, increasing.
            free: bytes of free memory; None where unknown, which passes.
        """
        if free is None or needed(self.context) <= free:
            return
        fits = STEP * bisect.bisect_right(range(STEP, self.context + 1, STEP), free, key=needed) or None
        what = f"the keys and values of {self.slots} slot{'s' * (self.slots > 1)} x {self.context:,} tokens"
        if self.slots == 1 and fits is None:
            remedy = "take a smaller model, or keep its weights in fewer bits"
        else:
            remedy = "lower " + ("{slots}, or " if self.slots > 1 else "") + "{context}"
            remedy += "" if fits is None else f" (to {fits:,} tokens)"
        raise OutOfMemory(no_room(what, needed(self.context), free, remedy), fits)

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
            InputError: the request's cache options differ from the engine's.
        """
        if request.cache != self.cache_options:
            raise InputError("all requests of an engine share its cache_options; make the request with these.")
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
            self.prefilling = None
        if number in self.running:
            self._free(self.running.pop(number))

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
        """Prefill one chunk of the next prompt, if a slot is free, and decode; returns the new tokens. If all requests
        are `blocked`, it first waits for a program."""
        generated: list[GeneratedToken] = []
        if self.blocked:
            self._wait()
        if self.prefilling is None and (chosen := self._next()) is not None:
            self.queued.remove(chosen)
            for request in self.queued:
                if request.group == chosen.group:
                    request.turn = next(self._numbers)
            self.prefilling = chosen, self._run(chosen)
        if self.prefilling is not None:
            request, pieces = self.prefilling
            if next(pieces, self) is self:  # the prefill is complete
                self.prefilling = None
                self.running[request.number] = request
        if self.running:
            held = any(request.matcher for request in self.running.values())  # looks at each token
            hurry = held or self.prefilling is not None or self._next() is not None
            room = min(request.left for request in self.running.values())
            began = time.perf_counter()
            steps = max(1, min(1 if hurry else self._steps, room))
            for number, token in self._decode(steps):
                if number in self.running:  # else the request finished a few steps earlier
                    generated.append(self._record(self.running[number], token))
            if steps == self._steps and not hurry:
                fast = time.perf_counter() - began < PATIENCE / 2
                self._steps = 2 * steps if fast else max(1, steps // 2)
        return generated

    def _next(self) -> RequestState | None:
        """The queued request that is next, if a slot is free for it and its programs are ready."""
        if len(self.running) >= self.slots or not self.queued:
            return None
        taken = Counter(request.group for request in self.running.values())
        for request in sorted(self.queued, key=lambda request: (taken[request.group], request.turn)):
            if taken[request.group] >= max(1, self.slots - 1):
                return None
            try:
                if self._ready(request):
                    return request
            except Exception as error:
                self.queued.remove(request)
                self.failed(request.number, error)
        return None

    def _ready(self, state: RequestState) -> bool:
        """Whether the programs of a request are ready; otherwise they are being compiled. Raises the error of one that
        could not be compiled."""
        return True

    def _wait(self) -> None:
        """Wait until `blocked` may have ended."""

    def _record(self, state: RequestState, token: int) -> GeneratedToken:
        state.generated.append(token)
        if state.finished:
            self._free(self.running.pop(state.number))
        return GeneratedToken(state.number, token, state.finished)

    @abstractmethod
    def _run(self, state: RequestState) -> Iterator[None]:
        """Prefill a request's prompt and give it a slot; yield after each chunk but the last."""

    @abstractmethod
    def _decode(self, steps: int) -> list[tuple[int, int]]:
        """Decode up to ``steps`` steps. Returns (request number, token) pairs in order.

        The list may be empty only where a token has been started and comes with the next call.
        """

    @abstractmethod
    def _free(self, state: RequestState) -> None:
        """Free the slot of a request."""


def shared(config: ModelConfig, prompt: Sequence[int], old: RequestState) -> int:
    """The length of the prefix that a prompt shares with an older request, whose keys and values can be copied.

    It is shorter than the prompt, because the last token must be run. It is 0 where the copy does not pay, and where
    one of the prompts is so long that dynamic NTK or LongRoPE rotates its keys in another way.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.grows(config.max_position_embeddings, max(len(prompt), len(old.prompt))):
        return 0
    text = (*old.prompt, *old.generated[:-1])  # the model never saw the last token
    most = min(len(prompt) - 1, len(text))
    same = next((i for i in range(most) if prompt[i] != text[i]), most)
    return same if same >= LEAST_SHARED else 0
