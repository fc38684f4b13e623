"""Checks of a request before the API sees it: host name, origin, API key, and the size and duration of its body."""

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
OPEN_PATHS = ("/health",)  # no key is needed, for monitoring
BODY_SECONDS, BODY_RATE = 20, 16 << 10  # a body may take 20 s, and one more second per 16 KiB
BODIES = 256 << 20  # bytes of all bodies at once; above it, each body may have an equal share
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """Who may use the server."""

    api_key: str | None = None  # None: everybody
    hosts: frozenset[str] | None = None  # accepted Host headers; None: any
    origins: tuple[str, ...] = ()  # origins of browser pages, such as http://localhost:3000, or "*"


def add_gate(app: FastAPI, access: Access, largest: int) -> None:
    """Add the checks to all paths of ``app``. ``largest``: most bytes of a body."""
    app.add_middleware(Gate, access=access, largest=largest)
    if access.origins:
        app.add_middleware(Cors, allow_origins=access.origins, allow_methods=("GET", "POST"), allow_headers=("*",))
    if access.hosts is not None:  # the middleware added last runs first
        app.add_middleware(Hosts, hosts=access.hosts)


class Hosts:
    """Refuses requests with another Host header (DNS rebinding: a page's own name may resolve to this machine, and the
    browser then treats the server as the page's origin)."""

    def __init__(self, app: Any, hosts: frozenset[str]):
        self.app, self._hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (asked := Headers(scope=scope).get("host")):  # HTTP/1.0 has none
            host = _host_of(asked)
            if host not in self._hosts and not host.endswith(".localhost"):
                message = f"this server does not go by the name {asked[:100]!r}; start it with --allowed-hosts NAME."
                return await refusal(403, message, code="host_not_allowed")(scope, receive, send)
        await self.app(scope, receive, send)


class Cors(CORSMiddleware):
    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.allow_private_network = True  # an allowed page may come from a public network

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        origin, method = (request_headers[n][:100] for n in ("origin", "access-control-request-method"))
        message = f"pages of {origin!r} may not send {method!r} here; start the server with --allowed-origins ORIGIN."
        return refusal(403, message, code="origin_not_allowed")


class Gate:
    """Refuses requests without the API key, and bodies that are too large or too slow."""

    def __init__(self, app: Any, access: Access, largest: int):
        self.app, self._largest = app, largest
        self._key = None if access.api_key is None else access.api_key.encode()
        self._sizes: dict[object, int] = {}  # bytes received of each open body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if self._key is not None and scope["path"] not in OPEN_PATHS and not self._knows(headers):
            message = "the API key is missing or wrong; send it as Authorization: Bearer KEY."
            return await refusal(401, message, code="invalid_api_key")(scope, receive, send)
        if "transfer-encoding" in headers and "content-length" in headers:
            # Request smuggling: a proxy may use the other header, and read part of this body as another request.
            message = "the request has both Transfer-Encoding and Content-Length; send one of them."
            response = refusal(400, message)
            response.headers["connection"] = "close"
            return await response(scope, receive, send)
        if int(headers.get("content-length", 0)) > self._largest:  # h11 accepts only whole numbers
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
        """``receive`` with the limits of size and time."""
        began, more = time.monotonic(), True

        async def counted() -> Any:
            nonlocal more
            if not more:  # waiting for the client to disconnect
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
    """The API key from --api-key or the environment; None without one. Raises `InputError` for an invalid key."""
    key = os.environ.get(KEY_VARIABLE) if flag is None else flag
    if key is None:
        return None
    if not key or key != key.strip() or not key.isprintable():
        what = "is empty" if not key.strip() else "has spaces around it or characters that no header can hold"
        name = KEY_VARIABLE if flag is None else "api_key"
        raise InputError(f"{what}; give a key, or leave it out to let everybody in.", option=name)
    return key


def checked_hosts(host: str, address: str, allowed: Sequence[str]) -> frozenset[str] | None:
    """The accepted Host headers.

    Arguments:
        host: from --host.
        address: the address that the server listens at.
        allowed: from --allowed-hosts.

    Returns:
        The names; None for any. A server that other machines can reach may have names that it does not know, so any is
        accepted unless ``allowed`` lists them.

    Raises:
        InputError: an entry of ``allowed`` is not a host name.
    """
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
    """The origins of --allowed-origins in lower case. Raises `InputError` for a text that is not an origin."""
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+", origin):
            raise InputError(
                f"holds {origin!r}; give what browsers send, such as http://localhost:3000, or *.",
                option="allowed_origins",
            )
    return tuple(origin.lower() for origin in origins)


def _host_of(header: str) -> str:
    """The host of a Host header, without the port; empty for an invalid header."""
    found = re.fullmatch(r"(\[[^][]*\]|[^][:]*)(?::[0-9]*)?", header)
    return _plain(found[1]) if found else ""


def _plain(host: str) -> str:
    return host.strip("[]").lower().removesuffix(".")
