"""How much one request may ask for, all of it found before any of the work is done."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from minicpm_data.generation.engine import PromptTooLong
from minicpm_data.tokenizer.text_bound import TextBound
from minicpm_serve.engine import ServingEngine
from minicpm_serve.http.errors import http_error
from weights_io.errors import InputError

# Bytes of a body for each token of the context: three prompts in Chinese, each character written as \uXXXX.
BYTES_PER_TOKEN = 32
LEAST_BODY = 1 << 20  # bytes


@dataclass(frozen=True)
class Limits:
    """``context``: tokens of a prompt and its answer. ``choices``: answers to one request. ``places``: answers that are
    made or wait. ``body``: bytes. ``bound``: of the tokenizer, if there is one."""

    context: int
    choices: int
    places: int
    body: int
    bound: TextBound | None

    @staticmethod
    def of(engine: ServingEngine, waiting: int) -> "Limits":
        """``waiting``: answers that may be open besides those in the slots. One request gets half the places."""
        places = engine.slots + waiting
        bound = None if engine.tokenizer is None else TextBound.of(engine.tokenizer)
        body = LEAST_BODY + BYTES_PER_TOKEN * engine.context
        return Limits(engine.context, max(1, places // 2), places, body, bound)

    def check_choices(self, asked: int) -> None:
        if asked > self.choices:
            raise InputError(f"{asked} answers are asked for; ask for at most {self.choices} at once.")

    def check_texts(self, texts: Iterable[str]) -> None:
        """`PromptTooLong` where texts that make one prompt are too long for the context however they are encoded."""
        if self.bound is None:
            return
        least = sum(map(self.bound.least_tokens, texts))
        if least > self.context:
            most = self.context * self.bound.per_token
            raise PromptTooLong(
                f"the prompt has at least {least:,} tokens, and there is room for {self.context:,} with the answer; "
                f"send less text (never more than {most:,} characters)."
            )

    def check_ids(self, ids: Sequence[int]) -> None:
        if len(ids) >= self.context:
            room = f"there is room for {self.context:,} with the answer"
            raise PromptTooLong(f"the prompt has {len(ids):,} tokens, and {room}; send fewer.")


class Places:
    """Counts the answers that are asked for but are not the engine's yet."""

    def __init__(self, engine: ServingEngine, most: int):
        self._engine, self._most = engine, most
        self._asked = 0

    @contextlib.contextmanager
    def kept(self, count: int) -> Iterator[None]:
        """So many until they are the engine's; 503 where there are not as many."""
        taken = self._engine.open + self._asked
        if taken + count > self._most:
            raise http_error(503, f"{taken} answers are being made or wait; try again later.", code="overloaded")
        self._asked += count
        try:
            yield
        finally:
            self._asked -= count
