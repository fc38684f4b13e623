"""The server's connections: timeouts for requests and readers, and eviction of the one that has idled longest.

uvicorn only limits the pause after an answer, and refuses new connections when there are too many.
"""

import asyncio
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from minicpm_serve.http.errors import error_body
from weights_io.command_line import allow_open_files
from weights_io.errors import InputError

REQUEST_SECONDS = 10  # from the connection, or the last answer, to the end of a request's headers
READING_SECONDS = 60  # a client that reads nothing of its answer for this time is disconnected
CLOSING_SECONDS = 2
MOST_CONNECTIONS = 1000
ACCEPTED = 64  # connections accepted in one turn of the event loop
OTHER_FILES = 128  # open files besides connections
UNREAD = 64 << 20  # bytes of a refused request that are still read, so that the client reads the refusal
CROWD = 8  # with more connections, pipelined requests are not read ahead: 600 in one packet take a second

Timer = asyncio.TimerHandle | None


def connection_class(refused: Callable[[int], None]) -> Any:
    """The protocol class that uvicorn uses for each connection. ``refused``: as for `Connection`."""
    return functools.partial(Connection, waiting={}, most=most_connections(), refused=refused)


def most_connections() -> int:
    """The most connections that the limit of open files allows. Raises `InputError` where it is below 32."""
    limit = allow_open_files()
    most = min(MOST_CONNECTIONS, limit - ACCEPTED - OTHER_FILES)
    if most < 32:
        raise InputError(f"this process may open only {limit} files; allow more with ulimit -n 1024.")
    return most


class Lingering:
    """A transport that only closes its write side while ``unread()``.

    If a connection is closed before all received data is read, the system drops the answer that is being sent.
    """

    def __init__(self, transport: Any, unread: Callable[[], bool], loop: asyncio.AbstractEventLoop):
        self._transport, self._unread, self._loop = transport, unread, loop
        self.lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        if self._unread():
            self.lingers = True
            self._transport.write_eof()
            self._transport.resume_reading()
        else:
            self._transport.close()
        self._loop.call_later(CLOSING_SECONDS, self._transport.abort)  # even if the client stops reading


class Connection(H11Protocol):
    """A connection with timeouts.

    Arguments:
        waiting: shared by all connections: those that have not sent a complete request or do not read their answer, the
            longest waiting first.
        most: most connections at once; above it the first of ``waiting`` is closed.
        refused: called with the status of an answer to what is no request yet.
    """

    def __init__(
        self,
        *given: Any,
        waiting: "dict[Connection, None]",
        most: int,
        refused: Callable[[int], None],
        **options: Any,
    ):
        super().__init__(*given, **options)
        self._waiting, self._most, self._refused = waiting, most, refused
        self._asking: Timer = None
        self._reading: Timer = None
        self._unread = 0  # bytes received of a refused body

    def connection_made(self, transport: Any) -> None:
        lingering: Any = Lingering(transport, self._is_unread, self.loop)
        super().connection_made(lingering)
        self._look()
        if len(self.connections) > self._most:
            next(iter(self._waiting)).evict()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.pop(self, None)
        for timer in (self._asking, self._reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        refused = self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY
        if refused or self.transport.is_closing():
            self._unread += len(data)
            if self._unread > UNREAD:
                self.transport.abort()
            if self.transport.is_closing():
                return
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        pipelined = self.conn.their_state is h11.DONE and self.conn.trailing_data[0].strip()
        if pipelined and len(self.connections) > CROWD:
            return self.transport.close()
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reading is None:
            self._reading = self.loop.call_later(READING_SECONDS, self.transport.abort)
            self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
            self._look()

    def send_400_response(self, msg: str) -> None:
        """Of what is no HTTP, or has headers of more than 16 KiB."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        what = "has headers that are too large" if status == 431 else "is no HTTP/1.1"
        self._refuse(status, f"the request {what}; send another.")

    def evict(self) -> None:
        """For another connection."""
        self._waiting.pop(self, None)
        self.connections.discard(self)
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._reading is None and not self.transport.is_closing():
            self._refuse(503, "there are too many connections; try again later.", "overloaded")
        else:
            self.transport.abort()

    def _look(self) -> None:
        """See what is waited for, and for how long."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle or self.cycle.more_body or self._reading is not None:
            self._waiting.setdefault(self)
        else:
            self._waiting.pop(self, None)
        if idle and self._asking is None:
            self._asking = self.loop.call_later(REQUEST_SECONDS, self._late)
        elif not idle and self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def _late(self) -> None:
        if self.conn.trailing_data[0]:  # a part of a request
            self._refuse(408, "the headers did not come in time; send them at once.", "timeout")
        else:
            self.transport.close()

    def _is_unread(self) -> bool:
        """Whether there may be more of a request that nobody wants."""
        return self in self.connections and self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def _refuse(self, status: int, message: str, code: str | None = None) -> None:
        """As an answer to what is no request yet, if there is none on its way."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            if self.cycle is not None:
                self.cycle.disconnected = True
            data = json.dumps(error_body(status, message, code=code)).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(data))),
                ("connection", "close"),
            ]
            response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
            for event in (response, h11.Data(data=data), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self._refused(status)
        self.transport.close()
