"""Asks an engine the lines of a prompts file, with as many open requests as keep it busy."""

import queue
import secrets
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi.exceptions import RequestValidationError

from minicpm_data.generation.responses import Response
from minicpm_serve.batches.lines import Line
from minicpm_serve.batches.results import ID, Results
from minicpm_serve.delivery import Answered
from minicpm_serve.engine import ServingEngine
from minicpm_serve.http.answers import CHAT, TEXT, Answer
from minicpm_serve.http.choices import Choice, chat_choices, text_choices
from minicpm_serve.http.errors import body_of
from minicpm_serve.http.limits import Limits
from minicpm_serve.http.schemas import ChatBody, sentence
from weights_io.errors import InputError
from weights_io.progress import progress_bar

AHEAD = 2  # open requests for each slot: the next prompt is there when a slot is free
EVERY = 15.0  # seconds between two lines about the progress where no bar is drawn


@dataclass
class Asked:
    """A line whose answers are not complete."""

    line: Line
    answers: list[Answer]
    prompt_tokens: int
    completion_tokens: int = 0
    requests: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return all(answer.reason is not None for answer in self.answers)


class Run:
    """The state of a run.

    Attributes:
        errors: lines that could not be answered.
        tokens: generated so far.
    """

    def __init__(self, engine: ServingEngine, name: str, results: Results):
        self.errors = self.tokens = self.lines = 0
        self._engine, self._name, self._results = engine, name, results
        self._limits = Limits.of(engine, engine.slots)
        self._made: queue.SimpleQueue[tuple[int, int, Answered]] = queue.SimpleQueue()
        self._open: dict[int, Asked] = {}
        self._began = self._said = time.monotonic()

    def answer(self, lines: Iterable[Line], total: int) -> None:
        """Write a result for each line that has none.

        Arguments:
            lines: the lines of the file, of which no more are read than are asked.
            total: the number that have no result.

        Raises:
            Exception: the engine stopped.
        """
        try:
            with progress_bar("answering", total, unit="prompt") as bar:
                for line in lines:
                    if self._results.done[line.number]:
                        continue
                    while len(self._open) >= AHEAD * self._engine.slots:
                        self._take(bar, total)
                    self._ask(line, bar)
                while self._open:
                    self._take(bar, total)
        finally:
            for asked in self._open.values():
                for request in asked.requests:
                    self._engine.cancel(request)

    @property
    def rate(self) -> float:
        """Generated tokens a second."""
        return self.tokens / max(time.monotonic() - self._began, 1e-9)

    def _ask(self, line: Line, bar: Any) -> None:
        try:
            choices = self._choices(line)
        except (InputError, RequestValidationError) as error:
            if self._engine.error is not None:
                raise
            self.errors += 1
            self._write(line, None, _error(error), 400, bar)
            return
        asked = Asked(line, [choice.answer() for choice in choices], sum(len(c.request.prompt) for c in choices))
        group = self._engine.group() if len(choices) > 1 else None
        self._open[line.number] = asked
        for index, choice in enumerate(choices):

            def deliver(made: Answered, index: int = index) -> None:  # on the engine's thread
                self._made.put((line.number, index, made))

            if choice.ends:
                deliver(Response("", None, "length"))
                continue
            asked.requests.append(self._engine.submit(deliver, choice.request, choice.stop, group, choice.parser()))

    def _choices(self, line: Line) -> list[Choice]:
        self._limits.check_choices(line.body.answers)
        if isinstance(line.body, ChatBody):
            prompts = chat_choices(self._engine, line.body, self._limits)
        else:
            prompts = text_choices(self._engine, line.body, self._limits)
        for index, choice in enumerate(prompts):
            if (scores := choice.scoring(self._engine)) is not None:
                prompts[index] = replace(choice, scores=tuple(scores.result()))
        return [choice.drawn(number) for choice in prompts for number in range(line.body.choices)]

    def _take(self, bar: Any, total: int) -> None:
        """Wait for a token, and write the result that it completes."""
        number, index, made = self._made.get()
        if isinstance(made, Exception):
            raise made
        asked = self._open[number]
        asked.answers[index].add(made)
        if made.token is not None:
            asked.completion_tokens += 1
            self.tokens += 1
        if asked.finished:
            del self._open[number]
            self._write(asked.line, asked, None, 200, bar)
        self._say(bar, total)

    def _write(self, line: Line, asked: Asked | None, error: dict[str, Any] | None, status: int, bar: Any) -> None:
        self.lines += 1
        if line.custom_id is None:
            result = {"line": line.number, **(error or _own(asked))}
        else:
            body = error or self._openai(asked)
            response = {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": body}
            result = {"id": f"{ID}{line.number}", "custom_id": line.custom_id, "response": response, "error": None}
        self._results.write(line.number, result)
        bar.update(1)

    def _openai(self, asked: Asked | None) -> dict[str, Any]:
        """What the server would answer."""
        assert asked is not None
        kind = CHAT if isinstance(asked.line.body, ChatBody) else TEXT
        choices = [kind.choice(index, answer) for index, answer in enumerate(asked.answers)]
        frame = {"id": kind.prefix + secrets.token_hex(12), "object": kind.name, "created": int(time.time())}
        return {**frame, "model": self._name, "choices": choices, "usage": _usage(asked)}

    def _say(self, bar: Any, total: int) -> None:
        if not bar.disable:
            bar.set_postfix_str(f"{self.rate:,.0f} tokens/s", refresh=False)
        elif time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            said = f"{self.lines:,} of {total:,} prompts, {self.rate:,.0f} tokens/s"
            if self.lines:
                left = (self._said - self._began) / self.lines * (total - self.lines)
                said += f", {left / 60:,.0f} min left"
            print(said, file=sys.stderr, flush=True)


def _own(asked: Asked | None) -> dict[str, Any]:
    """The result of a line that is not in OpenAI's format: the text of the answer, or of each of several."""
    assert asked is not None
    choices = []
    for answer in asked.answers:
        made: dict[str, Any] = {"text": answer.text, "finish_reason": answer.reason}
        if answer.reasoning:
            made["reasoning_content"] = answer.reasoning
        if answer.calls:
            made["tool_calls"] = answer.calls
        if (logprobs := answer.logprobs()) is not None:
            made["logprobs"] = logprobs
        if regions := answer.regions():
            made["regions"] = regions
        choices.append(made)
    answers = choices[0] if len(choices) == 1 else {"choices": choices}
    return {**answers, "usage": _usage(asked)}


def _usage(asked: Asked) -> dict[str, int]:
    prompt, answer = asked.prompt_tokens, asked.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _error(error: InputError | RequestValidationError) -> dict[str, Any]:
    if isinstance(error, RequestValidationError):
        message, param = sentence(error.errors())
        error = InputError(message)
        error.option = param
    return body_of(error)[1]
