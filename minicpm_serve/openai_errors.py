"""The API's refusals: OpenAI's JSON, ``{"error": {"message", "type", "param", "code"}}``, each message one sentence."""

import secrets
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from minicpm_data.engine import NoRoom
from minicpm_serve.engine import Ended
from minicpm_serve.openai_bodies import sentence
from weights_io.errors import InputError

LARGEST_BODY = 16 << 20  # bytes: ten times a prompt of 128k tokens
DEFECT = "an error of the server's own; its log says more."


def add_handlers(app: FastAPI, api_key: str | None) -> None:
    """Whatever goes wrong in ``app`` is answered in this way."""
    app.add_middleware(Gate, api_key=api_key)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(InputError, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _defect)


class Gate:
    """Lets nobody in without the key, if there is one, nor a body that is too large."""

    def __init__(self, app: Any, api_key: str | None):
        self.app, self._key = app, api_key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size = 0

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                raise http_error(413, f"the body is larger than {LARGEST_BODY >> 20} MiB; send less.")
            return message

        if scope["type"] == "http" and self._key is not None and scope["path"].startswith("/v1"):
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not secrets.compare_digest(key.encode("latin-1"), self._key.encode()):
                message = "the API key is missing or wrong; send it as Authorization: Bearer KEY."
                refusal = JSONResponse(error_body(401, message, code="invalid_api_key"), 401)
                return await refusal(scope, receive, send)
        await self.app(scope, counted, send)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    kind = "invalid_request_error" if status < 500 else "server_error"
    readable = message.encode(errors="replace").decode()  # it may repeat what is no Unicode
    return {"error": {"message": readable, "type": kind, "param": param, "code": code}}


def body_of(error: InputError) -> tuple[int, dict]:
    if isinstance(error, Ended):
        return 503, error_body(503, str(error), code="engine_ended")
    return 400, error_body(400, str(error), code="context_length_exceeded" if isinstance(error, NoRoom) else None)


def http_error(status: int, message: str, param: str | None = None, code: str | None = None) -> HTTPException:
    return HTTPException(status, error_body(status, message, param, code))  # type: ignore[arg-type]  # any JSON will do


def _invalid(_: Request, error: Any) -> JSONResponse:
    message, param = sentence(error.errors())
    return JSONResponse(error_body(400, message, param), 400)


def _refused(_: Request, error: Any) -> JSONResponse:
    status, body = body_of(error)
    return JSONResponse(body, status)


def _http(request: Request, error: Any) -> JSONResponse:
    """Ours, and those of the framework: paths and methods that there are not, a body that is no text."""
    if isinstance(error.detail, dict):
        body = error.detail
    elif error.status_code in (404, 405):
        body = error_body(
            error.status_code, f"{request.method} {request.url.path} is not served here; /docs lists what is."
        )
    else:
        body = error_body(error.status_code, "the body cannot be read as JSON.")
    return JSONResponse(body, error.status_code, error.headers)


def _defect(_: Request, error: Any) -> JSONResponse:
    return JSONResponse(error_body(500, DEFECT), 500)  # the traceback goes to standard error
