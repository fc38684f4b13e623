"""The JSON of a request: all of it, or a refusal. Python's own reader takes what is no JSON, and of two values of one
name the last."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from minicpm_serve.openai_errors import http_error


class JsonRoute(APIRoute):
    """Reads bodies with `parsed`."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strictly


class StrictRequest(Request):
    size = 0  # bytes of the body

    async def json(self) -> Any:
        body = await self.body()
        self.size, value = len(body), parsed(body)
        self._body = b""  # an answer may take minutes
        return value


def parsed(body: bytes) -> Any:
    """The value. A refusal of 400 where it is no JSON, holds a name twice, or is nested too deeply to be read."""
    try:
        return json.loads(body, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise http_error(400, f"the body is not JSON ({error.msg}, at {error.pos}).") from None
    except UnicodeDecodeError as error:
        raise http_error(400, f"the body is not UTF-8 text (byte {error.start}).") from None
    except RecursionError:
        raise http_error(400, "the body cannot be read as JSON (it is nested too deeply).") from None
    except ValueError:  # of a whole number with more than 4,300 digits
        raise http_error(400, "the body cannot be read as JSON (a number in it is too long).") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = Counter(names).most_common(1)[0][0]
        raise http_error(400, f"the body holds {twice!r} twice in one object; give it once.", twice[:100])
    return value


def _constant(name: str) -> NoReturn:
    raise http_error(400, f"the body is not JSON ({name} is no number of JSON).")
