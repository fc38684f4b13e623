"""Strict parsing of JSON bodies."""

from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute

from minicpm_serve.http.errors import http_error
from weights_io.errors import InputError
from weights_io.files import json_text


class JsonRoute(APIRoute):
    """Parses bodies strictly. Python's parser keeps the last of two equal keys, and has no limit of depth."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strictly


class StrictRequest(Request):
    size = 0  # bytes of the body

    async def json(self) -> Any:
        body = await self.body()
        self.size, self._body = len(body), b""  # free the body, because an answer may take minutes
        try:
            return await run_in_threadpool(
                json_text.loads, body, "the body", self.app.state.largest_body, "send other JSON"
            )
        except InputError as error:
            raise http_error(400, str(error)) from None
