"""What a request has to pass before the API sees it: the name it asks for, the page it comes from, the key, and the
size, the time and the share of memory of its body."""

import asyncio
import ipaddress
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from minicpm_serve.http.errors import http_error, refusal
from weights_io.errors import InputError

KEY_VARIABLE = "MINICPM_API_KEY"
OPEN_PATHS = ("/health",)  # without the key, for those who watch over servers
BODY_SECONDS, BODY_RATE = 20, 16 << 10  # a body may take so long, and a second more for so many bytes of it
BODIES = 256 << 20  # bytes of all bodies at once, beyond which each may have its share alone
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """Who is let in. ``hosts``: names of this server that a request may ask for; None: any. ``origins``: of pages in
    browsers, such as http://localhost:3000, or "*"."""

    api_key: str | None = None
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()


def add_gate(app: FastAPI, access: Access, largest: int) -> None:
    """In front of all paths of ``app``. ``largest``: bytes of a body."""
    app.add_middleware(Gate, access=access, largest=largest)
    if access.origins:
        app.add_middleware(Cors, allow_origins=access.origins, allow_methods=("GET", "POST"), allow_headers=("*",))
    if access.hosts is not None:  # what comes last stands in front
        app.add_middleware(Hosts, hosts=access.hosts)


class Hosts:
    """Answers only to its own names: a page elsewhere can let its own name point to this machine, and is then, to the
    browser, at home here (DNS rebinding)."""

    def __init__(self, app: Any, hosts: frozenset[str]):
        self.app, self._hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (asked := Headers(scope=scope).get("host")):  # HTTP/1.0 needs none
            host = _host_of(asked)
            if host not in self._hosts and not host.endswith(".localhost"):
                message = f"this server does not go by the name {asked[:100]!r}; start it with --allowed-hosts NAME."
                return await refusal(403, message, code="host_not_allowed")(scope, receive, send)
        await self.app(scope, receive, send)


class Cors(CORSMiddleware):
    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.allow_private_network = True  # a page that is allowed here may come from anywhere

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        origin, method = (request_headers[n][:100] for n in ("origin", "access-control-request-method"))
        message = f"pages of {origin!r} may not send {method!r} here; start the server with --allowed-origins ORIGIN."
        return refusal(403, message, code="origin_not_allowed")


class Gate:
    """Lets nobody in without the key, if there is one, nor a body that is too large or too slow."""

    def __init__(self, app: Any, access: Access, largest: int):
        self.app, self._largest = app, largest
        self._key = None if access.api_key is None else access.api_key.encode()
        self._sizes: dict[object, int] = {}  # of the bodies that are there

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if self._key is not None and scope["path"] not in OPEN_PATHS and not self._knows(headers):
            message = "the API key is missing or wrong; send it as Authorization: Bearer KEY."
            return await refusal(401, message, code="invalid_api_key")(scope, receive, send)
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy in front may go by the other one, and take a part of this body for a request of somebody else.
            message = "the request has both Transfer-Encoding and Content-Length; send one of them."
            response = refusal(400, message)
            response.headers["connection"] = "close"
            return await response(scope, receive, send)
        if int(headers.get("content-length", 0)) > self._largest:  # whole numbers, says h11
            return await refusal(413, self._too_large(), code="body_too_large")(scope, receive, send)
        request = object()
        try:
            await self.app(scope, self._counted(request, receive), send)
        finally:
            self._sizes.pop(request, None)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(
            key.strip(" \t").encode("latin-1"), self._key or b""
        )

    def _too_large(self) -> str:
        return f"the body is larger than {self._largest:,} bytes, which is what the context allows; send less."

    def _counted(self, request: object, receive: Any) -> Any:
        """``receive``, until the body is too much."""
        began, more = time.monotonic(), True

        async def counted() -> Any:
            nonlocal more
            if not more:  # it waits for the client to go away
                return await receive()
            size = self._sizes.get(request, 0)
            left = began + BODY_SECONDS + size / BODY_RATE - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0))
            except TimeoutError:
                raise http_error(408, "the body did not come in time; send it at once.", code="timeout") from None
            more = message.get("more_body", False)
            self._sizes[request] = size = size + len(message.get("body", b""))
            if size > self._largest:
                raise http_error(413, self._too_large(), code="body_too_large")
            if sum(self._sizes.values()) > BODIES and size > BODIES / len(self._sizes):
                raise http_error(503, "too many large requests are open; try again later.", code="overloaded")
            return message

        return counted


def checked_key(flag: str | None) -> str | None:
    """The key of --api-key, else that of the environment, if there is one. `InputError` for one that cannot be."""
    key = os.environ.get(KEY_VARIABLE) if flag is None else flag
    if key is None:
        return None
    if not key or key != key.strip() or not key.isprintable():
        what = "is empty" if not key.strip() else "has spaces around it or characters that no header can hold"
        name = KEY_VARIABLE if flag is None else "api_key"
        raise InputError(f"{what}; give a key, or leave it out to let everybody in.", option=name)
    return key


def checked_hosts(host: str, address: str, allowed: Sequence[str]) -> frozenset[str] | None:
    """The names of a server that was told to listen at ``host``, and does at ``address``; None: any. Where other
    machines can reach it, it may have names that it knows nothing of, and has any unless ``allowed`` lists them."""
    for name in allowed:
        if name != "*" and not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.]+\]", name):
            raise InputError(
                f"holds {name!r}; give a name or an address such as llm.example.org (no port), or *.",
                option="allowed_hosts",
            )
    outside = not ipaddress.ip_address(address.partition("%")[0]).is_loopback
    if "*" in allowed or (outside and not allowed):
        return None
    return frozenset(map(_plain, (*LOOPBACK, host, address, *allowed)))


def checked_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """As browsers write them. `InputError` for what they would never send."""
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+", origin):
            raise InputError(
                f"holds {origin!r}; give what browsers send, such as http://localhost:3000, or *.",
                option="allowed_origins",
            )
    return tuple(origin.lower() for origin in origins)


def _host_of(header: str) -> str:
    """Without the port; nothing where it is not a host, with a port or not."""
    found = re.fullmatch(r"(\[[^][]*\]|[^][:]*)(?::[0-9]*)?", header)
    return _plain(found[1]) if found else ""


def _plain(host: str) -> str:
    return host.strip("[]").lower().removesuffix(".")
