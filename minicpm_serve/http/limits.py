"""The limits of a request, checked before any work is done."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from minicpm_data.generation.engine import PromptTooLong
from minicpm_data.tokenizer.text_bound import TextBound
from minicpm_serve.engine import ServingEngine
from minicpm_serve.http.errors import http_error
from minicpm_serve.http.image_access import IMAGES_BODY, ImageAccess
from weights_io.errors import InputError

# Bytes of a body per token of the context: three prompts in Chinese, with every character written as \uXXXX.
BYTES_PER_TOKEN = 32
LEAST_BODY = 1 << 20  # bytes


@dataclass(frozen=True)
class Limits:
    """The limits of the server."""

    context: int  # most tokens of a prompt and its answer
    choices: int  # most answers to one request
    places: int  # most answers that are running or queued
    body: int  # most bytes of a body
    bound: TextBound | None  # least tokens of a text; None without a tokenizer
    images: ImageAccess | None  # None: the model takes none

    @staticmethod
    def of(engine: ServingEngine, waiting: int) -> "Limits":
        """The limits for an engine. ``waiting``: most queued answers. A request may use half of all places."""
        places = engine.slots + waiting
        bound = None if engine.tokenizer is None else TextBound.of(engine.tokenizer)
        images = None if engine.model.config.vision is None else engine.images
        body = LEAST_BODY + BYTES_PER_TOKEN * engine.context + (0 if images is None else IMAGES_BODY)
        return Limits(engine.context, max(1, places // 2), places, body, bound, images)

    def check_choices(self, asked: int) -> None:
        if asked > self.choices:
            raise InputError(f"the request asks for {asked} answers; ask for at most {self.choices} at once.")

    def check_texts(self, texts: Iterable[str]) -> None:
        """Raises `PromptTooLong` where the texts of a prompt are too long for the context under any encoding."""
        if self.bound is None:
            return
        least = sum(map(self.bound.least_tokens, texts))
        if least > self.context:
            most = self.context * self.bound.per_token
            raise PromptTooLong(
                f"the prompt has at least {least:,} tokens, and there is room for {self.context:,} with the answer; "
                f"send less text (never more than {most:,} characters)."
            )

    def check_messages(self, messages: Sequence[object]) -> None:
        if len(messages) > self.context:
            raise InputError(f"there are {len(messages):,} messages; send at most {self.context:,}.")

    def check_ids(self, ids: Sequence[int]) -> None:
        if len(ids) >= self.context:
            room = f"there is room for {self.context:,} with the answer"
            raise PromptTooLong(f"the prompt has {len(ids):,} tokens, and {room}; send fewer.")


class Places:
    """Reserves places for answers until they are submitted to the engine."""

    def __init__(self, engine: ServingEngine, most: int):
        self._engine, self._most = engine, most
        self._asked = 0

    @contextlib.contextmanager
    def kept(self, count: int) -> Iterator[None]:
        """Reserve ``count`` places within the context. Raises HTTP 503 where there are fewer."""
        taken = self._engine.open + self._asked
        if taken + count > self._most:
            raise http_error(503, f"{taken} answers are running or queued; try again later.", code="overloaded")
        self._asked += count
        try:
            yield
        finally:
            self._asked -= count
