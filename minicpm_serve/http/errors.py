"""Errors as OpenAI's JSON, ``{"error": {"message", "type", "param", "code"}}``. Each message is one sentence."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from minicpm_data.generation.engine import PromptTooLong
from minicpm_serve.delivery import EngineClosed
from minicpm_serve.http.schemas import sentence
from weights_io.errors import InputError

LONGEST = 600  # characters of a message, which may quote the request
DEFECT = "an error of the server's own; its log says more."


def add_handlers(app: FastAPI) -> None:
    """Answer all errors of ``app`` in this format."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(InputError, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _defect)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    kind = "invalid_request_error" if status < 500 else "server_error"
    if len(message) > LONGEST:
        message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
    readable = message.encode(errors="replace").decode()  # it may repeat what is no Unicode
    return {"error": {"message": readable, "type": kind, "param": param, "code": code}}


def refusal(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(status, message, param, code), status)


def body_of(error: InputError) -> tuple[int, dict]:
    if isinstance(error, EngineClosed):
        return 503, error_body(503, str(error), code="engine_ended")
    code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
    return 400, error_body(400, str(error), error.option, code)


def http_error(status: int, message: str, param: str | None = None, code: str | None = None) -> HTTPException:
    return HTTPException(status, error_body(status, message, param, code))  # type: ignore[arg-type]  # any JSON will do


def _invalid(_: Request, error: Any) -> JSONResponse:
    message, param = sentence(error.errors())
    return refusal(400, message, param)


def _refused(_: Request, error: Any) -> JSONResponse:
    status, body = body_of(error)
    return JSONResponse(body, status)


def _http(request: Request, error: Any) -> JSONResponse:
    """Our HTTP errors, and the framework's: unknown paths and methods, a body that is not text."""
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
    return refusal(500, DEFECT)  # the traceback goes to standard error
