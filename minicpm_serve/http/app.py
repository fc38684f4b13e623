"""OpenAI's HTTP API over `minicpm_serve.engine.ServingEngine`.

The engine puts each token into the event loop. No thread waits for a token, so any number of answers can be open.
"""

import asyncio
import contextlib
import functools
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from minicpm_data.generation import responses
from minicpm_serve.delivery import Answered, known
from minicpm_serve.engine import ServingEngine
from minicpm_serve.http.answers import CHAT, TEXT, Kind, delta_choice, prompt_piece
from minicpm_serve.http.choices import Choice, chat_choices, text_choices
from minicpm_serve.http.errors import DEFECT, add_handlers, body_of, error_body, http_error
from minicpm_serve.http.gate import Access, add_gate
from minicpm_serve.http.json_route import JsonRoute, StrictRequest
from minicpm_serve.http.limits import Limits, Places
from minicpm_serve.http.metrics import Metrics, add_metrics
from minicpm_serve.http.records import Record, Recorder, record_of
from minicpm_serve.http.responses_body import ResponsesBody
from minicpm_serve.http.responses_reply import Reply
from minicpm_serve.http.schemas import ChatBody, CompletionBody
from minicpm_serve.http.tokenizing import add_tokenizing
from weights_io.errors import InputError

CLIENT_LEFT = 499  # nginx's status for a client that disconnected
LARGE = 64 << 10  # bytes; larger bodies are tokenized one at a time: 2 million characters take 1 GB and 5 s
NO_MODEL = "model_not_found"


def application(engine: ServingEngine, name: str, waiting: int = 256, access: Access | None = None) -> FastAPI:
    """The API as an ASGI application.

    Arguments:
        engine: runs the model.
        name: the model's name in requests.
        waiting: most queued answers, besides the running ones.
        access: who may use it; None: everybody.
    """
    app = FastAPI(title=f"{name} with OpenAI's API")
    app.router.route_class = JsonRoute
    limits = Limits.of(engine, waiting)
    app.state.largest_body, app.state.limits = limits.body, limits
    add_handlers(app)
    add_gate(app, access or Access(), limits.body)
    app.state.metrics = metrics = Metrics(engine, name)
    add_metrics(app, metrics)
    app.add_middleware(Recorder, metrics=metrics)  # added last, so it runs first
    kind_of_model = {"object": "model", "created": int(time.time()), "owned_by": "minicpm-jax-mlx"}
    names = [name, *(f"{name}:{adapter}" for adapter in engine.adapters)]  # at the index of the adapter
    places, one_by_one = Places(engine, limits.places), asyncio.Semaphore()

    @app.get("/health")
    async def health() -> dict:
        _require_engine(engine)
        programs = engine.programs
        return {"status": "ok", "programs": programs} if programs else {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": each, **kind_of_model} for each in names]}

    @app.get("/v1/models/{asked:path}")
    async def the_model(asked: str) -> dict:
        _require_model(names, asked)
        return {"id": asked, **kind_of_model}

    add_tokenizing(app, engine, limits, lambda asked: _require_model(names, name if asked is None else asked))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: StrictRequest) -> Response:
        return await answered(body, request, CHAT, chat_choices)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: StrictRequest) -> Response:
        return await answered(body, request, TEXT, text_choices)

    @app.post("/v1/responses")
    async def responses_of(body: ResponsesBody, request: StrictRequest) -> Response:
        answers, model = await begun(await run_in_threadpool(body.chat), request, chat_choices)
        reply = Reply(body, model)
        if body.stream:
            return Events(answers, reply_events(answers, reply))
        with contextlib.closing(answers):
            return await whole_reply(answers, reply, request)

    async def begun(body: Any, request: StrictRequest, of_body: Callable) -> tuple[Answers, str]:
        """The answers to a request, which are being generated, and the name of the model."""
        asked_for = name if body.model is None else body.model
        adapter = _require_model(names, asked_for)
        _require_engine(engine)
        body.check()
        limits.check_choices(body.answers)
        with places.kept(body.answers):
            async with one_by_one if request.size > LARGE else contextlib.nullcontext():
                made: list[Choice] = await run_in_threadpool(of_body, engine, body, limits)
            prompts = [choice.adapted(adapter) for choice in made]
            _require_engine(engine)
            prompts = await described(engine, prompts)
            asked = [choice.drawn(number) for choice in prompts for number in range(body.choices)]
            prompt_tokens = sum(len(choice.request.prompt) for choice in prompts)
            return Answers(engine, asked, prompt_tokens, record_of(request.scope)), asked_for

    async def answered(body: Any, request: StrictRequest, kind: Kind, of_body: Callable) -> Response:
        answers, asked_for = await begun(body, request, of_body)
        frame = {"id": kind.prefix + secrets.token_hex(12), "created": int(time.time()), "model": asked_for}
        if body.stream:
            return Events(answers, events(answers, {**frame, "object": kind.piece_name}, kind, body.with_usage))
        with contextlib.closing(answers):
            return await whole(answers, {**frame, "object": kind.name}, kind, request)

    return app


class Answers:
    """Iterates over the `Response`s of several choices as they arrive, with the index of the choice.

    `close` cancels the unfinished ones.
    """

    def __init__(self, engine: ServingEngine, choices: Sequence[Choice], prompt_tokens: int, record: Record):
        self.count = len(choices)
        self.answers = [choice.answer() for choice in choices]
        self._left = set(range(self.count))  # unfinished answers
        self._why = "abort"  # they are unfinished
        self._usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 0}
        self._engine, self._numbers, self._record = engine, list[int](), record
        group = engine.group() if len(choices) > 1 else None
        self._made: asyncio.Queue[tuple[int, Answered, float]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(index: int, made: Answered) -> None:  # on the engine's thread
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(self._made.put_nowait, (index, made, time.perf_counter()))

        try:
            for index, choice in enumerate(choices):
                if choice.ends:
                    deliver(index, responses.Response("", None, "length"))
                    continue
                to = functools.partial(deliver, index)
                self._numbers.append(engine.submit(to, choice.request, choice.stop, group, choice.parser()))
        except Exception:
            self._cancel()
            raise
        record.submitted(prompt_tokens)

    async def __aiter__(self) -> AsyncIterator[tuple[int, responses.Response]]:
        while self._left:
            index, made, at = await self._made.get()
            if isinstance(made, Exception):
                self._why = "abort" if isinstance(made, ClientDisconnect) else "error"
                raise made
            if made.token is not None:
                self._usage["completion_tokens"] += 1
                self._record.token(index, at)
            if made.finish_reason is not None:
                self._left.discard(index)
                self._record.finished(index, made.finish_reason)
            yield index, made

    def usage(self) -> dict[str, int]:
        return {**self._usage, "total_tokens": sum(self._usage.values())}

    async def end_with(self, request: Request) -> None:
        """Wait until the client disconnects, and then raise `ClientDisconnect` in the iteration."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._made.put_nowait((0, ClientDisconnect(), 0.0))

    def close(self) -> None:
        while self._left:
            self._record.finished(self._left.pop(), self._why)
        self._cancel()

    def _cancel(self) -> None:
        for number in self._numbers:
            self._engine.cancel(number)


async def described(engine: ServingEngine, choices: Sequence[Choice]) -> list[Choice]:
    """The choices, with the scores of the prompts that are part of an answer."""
    found = []
    for choice in choices:
        if (future := await run_in_threadpool(choice.scoring, engine)) is not None:
            scores = await asyncio.wrap_future(future)
            choice = replace(choice, scores=tuple(scores))
        found.append(choice)
    return found


async def whole(answers: Answers, frame: dict, kind: Kind, request: Request) -> Response:
    """The response with all answers, once they are finished."""
    if not await received(answers, request, lambda index, response: answers.answers[index].add(response)):
        return Response(status_code=CLIENT_LEFT)
    choices = [kind.choice(index, made) for index, made in enumerate(answers.answers)]
    return JSONResponse({**frame, "choices": choices, "usage": answers.usage()})


async def whole_reply(answers: Answers, reply: Reply, request: Request) -> Response:
    """The response of ``/v1/responses``, once its answer is finished."""
    (answer,) = answers.answers

    def take(_: int, response: responses.Response) -> None:
        for _event in reply.add(answer, response):
            pass

    if not await received(answers, request, take):
        return Response(status_code=CLIENT_LEFT)
    *_, last = reply.end(answer.reason, answers.usage())
    return JSONResponse(last["response"])


async def received(answers: Answers, request: Request, take: Callable[[int, responses.Response], object]) -> bool:
    """Call ``take`` with the responses of all answers, until they are finished. False: the client disconnected."""
    watching = asyncio.create_task(answers.end_with(request))
    try:
        async for index, response in answers:
            take(index, response)
    except ClientDisconnect:
        return False
    finally:
        watching.cancel()
    return True


class Events(StreamingResponse):
    """Server-sent events. When they end or the client disconnects, the answers are cancelled."""

    def __init__(self, answers: Answers, made: AsyncIterator[str]):
        super().__init__(made, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


async def events(answers: Answers, frame: dict, kind: Kind, with_usage: bool) -> AsyncIterator[str]:
    """One event per chunk of text, then "[DONE]". An error ends the stream."""

    def event(*choices: dict, usage: dict | None = None) -> str:
        return _event({**frame, "choices": choices, **({"usage": usage} if with_usage else {})})

    if kind.first is not None:
        for index in range(answers.count):
            yield event(delta_choice(index, kind.first))
    for index, answer in enumerate(answers.answers):
        if answer.text:
            yield event(prompt_piece(index, answer))
    try:
        async for index, response in answers:
            for piece in kind.pieces(index, answers.answers[index], response):
                yield event(piece)
    except InputError as error:
        yield _event(body_of(error)[1])
        return
    except Exception:
        yield _event(error_body(500, DEFECT))
        raise
    if with_usage:
        yield event(usage=answers.usage())
    yield "data: [DONE]\n\n"


async def reply_events(answers: Answers, reply: Reply) -> AsyncIterator[str]:
    """The events of ``/v1/responses``. An error ends the stream."""
    (answer,) = answers.answers
    for event in reply.begin():
        yield _named(event)
    try:
        async for _, response in answers:
            for event in reply.add(answer, response):
                yield _named(event)
    except InputError as error:
        yield _named(reply.failed(body_of(error)[1]["error"]))
        return
    except Exception:
        yield _named(reply.failed(error_body(500, DEFECT)["error"]))
        raise
    for event in reply.end(answer.reason, answers.usage()):
        yield _named(event)


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _named(value: dict) -> str:
    return f"event: {value['type']}\n{_event(value)}"


def _require_engine(engine: ServingEngine) -> None:
    if engine.error is not None:
        raise http_error(503, "the engine has ended; start the server again.", code="engine_ended")


def _require_model(names: Sequence[str], asked: str) -> int:
    """The adapter of the model that is asked for. Raises an error 404 for an unknown one."""
    if asked not in names:
        one = f"the one that is loaded is {names[0]!r}" if len(names) == 1 else f"there {known(names)}"
        raise http_error(404, f"there is no model {asked!r} here; {one}.", "model", NO_MODEL)
    return names.index(asked)
