"""Speculation in an engine: what is guessed for each running request, and whether guessing pays.

One run of the model verifies the guesses of all requests, and each request accepts its own number. A request that is
held by a grammar gets no guess, and so one token. The tokens are those of plain decoding: `speculation` says why.

Guessing pays while a run is bound by reading weights; with many requests it is bound by arithmetic. Where that begins
depends on the machine, the model and the text, so it is measured (`Pace`).

Dims: B rows, K guesses, W = K + 1.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic

import numpy as np

from minicpm_data.generation.request import ModelT
from minicpm_data.generation.request_state import RequestState
from minicpm_data.generation.speculation import PromptLookup, Speculation

NONE, PROPOSED = -1, -2  # in place of a guess: there is none; it is that of the draft model
TRIALS = 4  # calls of each way of decoding before the two are compared; the first, which may be slow, does not count
AGAIN, SELDOM = 256, 4096  # tokens of each request until the slower way is tried again: at first, and at most
FEW = 4  # steps without a guess after which the text is searched again


@dataclass
class _Speed:
    calls: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.calls += 1
        if self.calls > 1:
            self.tokens, self.seconds = 0.9 * self.tokens + tokens, 0.9 * self.seconds + seconds

    @property
    def rate(self) -> float:
        """Tokens per second; recent calls count more."""
        return self.tokens / max(self.seconds, 1e-9)


@dataclass
class _Race:
    """The two ways of decoding. ``speeds``: plain, guessed. After ``wait`` tokens the slower one is tried again, and
    if it is still slower, after twice as many."""

    speeds: list[_Speed] = field(default_factory=lambda: [_Speed(), _Speed()])
    since: float = 0.0
    wait: int = AGAIN
    best: bool | None = None  # when they were compared

    def pays(self) -> bool:
        plain, guessed = self.speeds
        if guessed.calls < TRIALS or plain.calls < TRIALS:
            return guessed.calls < TRIALS
        return guessed.rate > plain.rate

    def record(self, guessed: bool, tokens: int, seconds: float, steps: float) -> None:
        self.speeds[guessed].add(tokens, seconds)
        if min(speed.calls for speed in self.speeds) < TRIALS:
            return
        best, before = self.pays(), self.best
        if best != before:  # also the first time
            self.best, self.wait, self.since = best, AGAIN, 0.0
        self.since += steps
        if self.since >= self.wait:
            self.speeds[not best], self.since, self.wait = _Speed(), 0.0, min(2 * self.wait, SELDOM)


class Pace:
    """Whether guessing makes more tokens a second than plain decoding, for 1, 2 to 3, 4 to 7, ... running requests."""

    def __init__(self) -> None:
        self._races: dict[int, _Race] = {}

    def pays(self, running: int) -> bool:
        """Whether to guess in the next call: first to try it, then if it was faster."""
        return self._races.setdefault(running.bit_length(), _Race()).pays()

    def record(self, running: int, guessed: bool, tokens: int, seconds: float) -> None:
        """Take in a call, which made so many tokens."""
        race = self._races.setdefault(running.bit_length(), _Race())
        race.record(guessed, tokens, seconds, tokens / running)


@dataclass(frozen=True)
class Plan:
    """The guesses of one run.

    Attributes:
        given: [B, K] int32, ids, or `NONE` behind a row's last one; `PROPOSED` where the draft model guesses.
        forced: [W, B] int32, the ids that rows are forced to after each input; -1 where a token is sampled.
        counts: guesses of each row. What is forced is no guess.
    """

    given: np.ndarray
    forced: np.ndarray
    counts: list[int]


class Guessing(Generic[ModelT]):
    """The speculation of an engine.

    Attributes:
        draft_model: as in `Speculation`.
        count: K.
        pace: says when it is used.
        drafted, accepted: guesses so far, and how many of them were right.
    """

    def __init__(self, speculation: Speculation[ModelT]):
        self.draft_model, self.count = speculation.draft_model, speculation.num_draft_tokens
        self.pace = Pace()
        self.drafted = self.accepted = 0
        self._lookups: weakref.WeakKeyDictionary[RequestState, PromptLookup] = weakref.WeakKeyDictionary()

    def plan(self, rows: Sequence[RequestState | None], room: int) -> Plan | None:
        """The guesses of these rows, which have pages for ``room`` of them each; None without any."""
        given = np.full((len(rows), self.count), NONE, np.int32)
        forced, counts = np.full((self.count + 1, len(rows)), -1, np.int32), [0] * len(rows)
        for row, state in enumerate(rows):
            if state is None:
                continue
            state.look()
            most = min(self.count, room, state.left - 1)
            if state.thought is not None and state.thought.forced:
                ids = state.thought.forced[: most + 1]
                forced[: len(ids), row], given[row, : len(ids[:most])] = ids, ids[:most]
                continue
            guesses = self._of(state, most)
            given[row, : len(guesses)], counts[row] = guesses, len(guesses)
        return Plan(given, forced, counts) if (given != NONE).any() else None

    def _of(self, state: RequestState, most: int) -> Sequence[int]:
        """At most so many guesses for a request."""
        if state.matcher is not None:
            return ()
        if state.thought is not None:
            most = min(most, state.thought.free - 1)  # it is looked at after all of them
        if self.draft_model is not None:
            return [PROPOSED] * most
        return self._lookups.setdefault(state, PromptLookup())(state.text, most) if most > 0 else ()

    def count_run(self, guesses: int, tokens: int) -> None:
        """Count a row's guesses in a run that gave it so many tokens."""
        if guesses:
            self.drafted, self.accepted = self.drafted + guesses, self.accepted + tokens - 1
