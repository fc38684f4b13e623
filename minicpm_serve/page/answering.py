"""An answer on the page: the same request and the same engine as those of the API."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from minicpm_data.sampling_defaults import SamplingDefaults
from minicpm_serve.engine import ServingEngine
from minicpm_serve.http.app import Answers
from minicpm_serve.http.choices import chat_choices
from minicpm_serve.http.limits import Limits, Places
from minicpm_serve.http.metrics import Metrics
from minicpm_serve.http.records import Record
from minicpm_serve.http.schemas import ChatBody
from weights_io.errors import InputError

EVERY = 0.05  # seconds between two updates of the page


@dataclass(frozen=True)
class Shown:
    """An answer, as far as it is generated.

    Attributes:
        text, reasoning: of the answer and of its thought.
        thinking: the thought goes on.
        thought_seconds: how long it took so far.
        tokens: generated so far.
        tokens_per_second: from the first token on; None before the second.
        finish_reason: None while the answer goes on.
    """

    text: str = ""
    reasoning: str = ""
    thinking: bool = False
    thought_seconds: float = 0.0
    tokens: int = 0
    tokens_per_second: float | None = None
    finish_reason: str | None = None


class Answering:
    """Answers the page's conversations."""

    def __init__(self, engine: ServingEngine, metrics: Metrics, limits: Limits):
        """``limits``: of the page's requests."""
        self.engine, self._metrics, self._limits = engine, metrics, limits
        self._places = Places(engine, limits.places)

    @property
    def usual(self) -> SamplingDefaults:
        """The sampling that the model's files or card state for a chat."""
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer.sampling.of(None)

    @property
    def thinks(self) -> bool:
        """Whether the chat template has thoughts that can be turned on and off."""
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer.features.thinking

    @property
    def sees(self) -> bool:
        """Whether the model takes images."""
        return self._limits.images is not None

    @property
    def context(self) -> int:
        return self.engine.context

    async def answer(self, request: dict[str, Any]) -> AsyncGenerator[Shown, None]:
        """Stream the answer to a body of ``/v1/chat/completions``. Its tokens are counted in the metrics, and a line is
        logged. Closing the iterator cancels the answer.

        Raises:
            InputError: the body is not valid, or there is no place for another answer.
        """
        try:
            body = ChatBody(**request)
        except ValidationError as error:  # the page's own controls are within bounds
            raise InputError(str(error.errors()[0]["msg"])) from None
        record = Record(self._metrics, "PAGE", "/")
        try:
            body.check()
            with self._places.kept(body.answers):
                choices = await run_in_threadpool(chat_choices, self.engine, body, self._limits)
                answers = Answers(self.engine, choices, sum(len(c.request.prompt) for c in choices), record)
            record.status = 200
            with contextlib.closing(answers):
                async for shown in _shown(answers):
                    yield shown
        except InputError:
            record.status = 400
            raise
        except HTTPException as refused:  # no place is left
            record.status = refused.status_code
            raise InputError(refused.detail["error"]["message"]) from None  # type: ignore[index]
        except (GeneratorExit, asyncio.CancelledError):
            record.left = True
            raise
        finally:
            record.ended()


async def _shown(answers: Answers) -> AsyncGenerator[Shown, None]:
    answer = answers.answers[0]
    began, tokens, latest = time.perf_counter(), 0, 0.0
    first: float | None = None
    thought = 0.0
    async for _, response in answers:
        now = time.perf_counter()
        answer.add(response)
        tokens += response.token is not None
        first = now if first is None else first
        if response.reasoning:
            thought = now - began
        if answer.reason is None and now - latest < EVERY:
            continue
        latest = now
        speed = (tokens - 1) / (now - first) if now > first else None
        thinking = bool(answer.reasoning) and not answer.text and answer.reason is None
        yield Shown(answer.text, answer.reasoning, thinking, thought, tokens, speed, answer.reason)
