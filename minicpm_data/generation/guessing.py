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
AGAIN = 128  # calls of the faster way until the other one is tried again


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
class Pace:
    """Whether guessing makes more tokens a second than plain decoding, for 1, 2 to 3, 4 to 7, ... running requests."""

    _speeds: dict[tuple[int, bool], _Speed] = field(default_factory=dict)

    def _of(self, running: int, guessed: bool) -> _Speed:
        return self._speeds.setdefault((running.bit_length(), guessed), _Speed())

    def pays(self, running: int) -> bool:
        """Whether to guess in the next call: first to try it, then if it was faster."""
        guessed, plain = self._of(running, True), self._of(running, False)
        if guessed.calls < TRIALS or plain.calls < TRIALS:
            return guessed.calls < TRIALS
        return guessed.rate > plain.rate

    def record(self, running: int, guessed: bool, tokens: int, seconds: float) -> None:
        """Take in a call, which made so many tokens."""
        own = self._of(running, guessed)
        own.add(tokens, seconds)
        if own.calls >= TRIALS + AGAIN:
            own.calls = TRIALS
            self._speeds[running.bit_length(), not guessed] = _Speed()


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
