"""Continuous batching: many requests share one model, each coming and going when it likes.

An engine has slots. A request waits for one; its prompt is run piece by piece, and between the pieces the requests in
the other slots go on decoding, all in one batch. What the prompt has in common with a text whose keys and values are
still there is copied from it. Each request's tokens are those of a run by itself. A backend adds what computes.

Requests may belong together, as several answers to one question do: such a group never has the last slot, and while
others wait the slots go round among the groups.
"""

import bisect
import itertools
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic

from minicpm_data.generation.options import PLAIN_CACHE, CacheOptions
from minicpm_data.generation.request import GenerationRequest, ModelT, PromptIds
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.memory import no_room

STEP = 256  # tokens, in which a context that is too long is shortened
LEAST_SHARED = 16  # tokens at the beginning of two texts for which a copy pays
PATIENCE = 0.05  # seconds that one call of decoding may take before a reader would notice


class NoRoom(InputError):
    """Of a prompt that is too long, with the answer that it is to have."""


class TooMuch(InputError):
    """Of caches that could not all be filled. ``context``: what there is room for with as many slots, if anything."""

    def __init__(self, sentence: str, context: int | None):
        super().__init__(sentence, others=["slots", "context"])
        self.context = context


@dataclass(eq=False)
class RequestState:
    """How far a request of one prompt has come. ``made``: tokens so far. ``number``: by which its owner knows it.
    ``group``: what it belongs to, its own number where that is nothing. ``turn``: of those whose groups have as many
    slots the lowest one comes first."""

    number: int
    request: GenerationRequest
    group: int
    turn: int
    made: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> PromptIds:
        return self.request.prompt

    @property
    def left(self) -> int:
        return self.request.max_tokens - len(self.made)

    @property
    def over(self) -> bool:
        return self.left == 0 or bool(self.made and self.made[-1] in self.request.end_ids)


@dataclass(frozen=True)
class Made:
    """A token of the request of that number; ``last``: no more will follow."""

    number: int
    token: int
    last: bool


class Engine(ABC, Generic[ModelT]):
    """Not for several threads: `minicpm_serve.engine` is."""

    def __init__(
        self,
        model: ModelT,
        slots: int = 8,
        context: int | None = None,
        cache_options: CacheOptions = PLAIN_CACHE,
    ):
        """``slots``: requests decoded at once. ``context``: most tokens of a prompt and its answer; None: as many as
        the model was made for. ``cache_options``: of every request's cache; whole, or in 8 bits in JAX."""
        context = model.config.max_position_embeddings if context is None else context
        for name, value, least in (("slots", slots, 1), ("context", context, 2)):  # a prompt and an answer
            if value != int(value) or value < least:
                raise InputError(f"is {value}; it must be a whole number, at least {least}.", option=name)
        if cache_options.max_kv_size is not None:
            raise InputError("does not go with an engine, which keeps every token; leave it out.", "max_kv_size")
        self.model, self.slots, self.context, self.cache_options = model, slots, context, cache_options
        self.waiting: deque[RequestState] = deque()
        self.coming: tuple[RequestState, Iterator[None]] | None = None  # whose prompt is run
        self.running: dict[int, RequestState] = {}
        self._numbers = itertools.count()
        self._steps = 1

    def _check_room(self, needed: Callable[[int], int], free: int | None) -> None:
        """`TooMuch` where the caches for requests of this context could not all be filled. ``needed``: their bytes
        by context, more for a longer one."""
        if free is None or needed(self.context) <= free:
            return
        fits = STEP * bisect.bisect_right(range(STEP, self.context + 1, STEP), free, key=needed) or None
        what = f"the keys and values of {self.slots} slot{'s' * (self.slots > 1)} x {self.context:,} tokens"
        if self.slots == 1 and fits is None:
            remedy = "take a smaller model, or keep its weights in fewer bits"
        else:
            remedy = "lower " + ("{slots}, or " if self.slots > 1 else "") + "{context}"
            remedy += "" if fits is None else f" (to {fits:,} tokens)"
        raise TooMuch(no_room(what, needed(self.context), free, remedy), fits)

    def add(self, request: GenerationRequest) -> int:
        """The number of the request. `InputError` as in `admitted`."""
        state = self.admitted(request)
        self.waiting.append(state)
        return state.number

    def group(self) -> int:
        """The number of a new one. Any thread may call this, and `admitted`, at any time."""
        return next(self._numbers)

    def admitted(self, request: GenerationRequest, group: int | None = None) -> RequestState:
        """What may be put into ``waiting``. `InputError` for a request that has no room, or asks for another cache."""
        if request.cache != self.cache_options:
            raise InputError("an engine keeps one kind of cache; make the request with its cache_options.")
        self.check_context(len(request.prompt), request.max_tokens)
        number = next(self._numbers)
        return RequestState(number, request, number if group is None else group, number)

    def check_context(self, length: int, max_tokens: int) -> None:
        """`NoRoom` for so many tokens of a prompt and of its answer."""
        if length + max_tokens > self.context:
            asked = f"a prompt of {length} tokens and {max_tokens} more"
            raise NoRoom(f"{asked} are above the {self.context} that there is room for.")

    def cancel(self, number: int) -> None:
        """No more tokens of a request; nothing if it is over."""
        self.waiting = deque(request for request in self.waiting if request.number != number)
        if self.coming is not None and self.coming[0].number == number:
            self.coming = None
        if number in self.running:
            self._free(self.running.pop(number))

    @property
    def idle(self) -> bool:
        return not self.waiting and self.coming is None and not self.running

    def step(self) -> list[Made]:
        """Run a piece of a prompt that waits, if there is room, and decode; the tokens that came of it."""
        made: list[Made] = []
        if self.coming is None and (chosen := self._next()) is not None:
            self.waiting.remove(chosen)
            for request in self.waiting:
                if request.group == chosen.group:
                    request.turn = next(self._numbers)
            self.coming = chosen, self._run(chosen)
        if self.coming is not None:
            request, pieces = self.coming
            if next(pieces, self) is self:  # all of them
                self.coming = None
                self.running[request.number] = request
        if self.running:
            hurry = self.coming is not None or self._next() is not None
            room = min(request.left for request in self.running.values())
            began = time.perf_counter()
            steps = max(1, min(1 if hurry else self._steps, room))
            for number, token in self._decode(steps):
                if number in self.running:  # else of a request that ended a few steps before
                    made.append(self._made(self.running[number], token))
            if steps == self._steps and not hurry:
                fast = time.perf_counter() - began < PATIENCE / 2
                self._steps = 2 * steps if fast else max(1, steps // 2)
        return made

    def _next(self) -> RequestState | None:
        """Of those that wait the one that comes next, if a slot is free for it."""
        if len(self.running) >= self.slots or not self.waiting:
            return None
        taken = Counter(request.group for request in self.running.values())
        first = min(self.waiting, key=lambda request: (taken[request.group], request.turn))
        return first if taken[first.group] < max(1, self.slots - 1) else None

    def _made(self, state: RequestState, token: int) -> Made:
        state.made.append(token)
        if state.over:
            self._free(self.running.pop(state.number))
        return Made(state.number, token, state.over)

    @abstractmethod
    def _run(self, state: RequestState) -> Iterator[None]:
        """Run the prompt of a request, yielding after each piece but the last, and give it a slot."""

    @abstractmethod
    def _decode(self, steps: int) -> list[tuple[int, int]]:
        """Decode up to so many steps; numbers and tokens in their order. At least one comes, or one is on its way."""

    @abstractmethod
    def _free(self, state: RequestState) -> None:
        """Give up the slot of a request."""


def shared(config: ModelConfig, prompt: Sequence[int], old: RequestState) -> int:
    """Tokens at the beginning of a prompt whose keys and values an older request has; 0 where a copy does not pay.
    Less than the whole prompt: its last token has to be run. Under dynamic NTK keys are turned by the length of their
    prompt once that is beyond the model's."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.type == "dynamic":
        if max(len(prompt), len(old.prompt)) > config.max_position_embeddings:
            return 0
    text = (*old.prompt, *old.made[:-1])  # the last token went into no model
    most = min(len(prompt) - 1, len(text))
    same = next((i for i in range(most) if prompt[i] != text[i]), most)
    return same if same >= LEAST_SHARED else 0
