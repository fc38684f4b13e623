"""A record of each request, from which its log line and the metrics are made. It holds nothing of a request's contents.

2026-12-01 09:30:12 INFO POST /v1/completions 200 1.320s prompt_tokens=5 completion_tokens=48 first_token=0.081s
tokens_per_second=38.0
"""

import logging
import sys
import time
from typing import Any

from minicpm_serve.http.metrics import Metrics
from weights_io.errors import UNPRINTABLE, short

LOG = logging.getLogger("minicpm_serve")
FORMAT = "%(asctime)s %(levelname)s %(message)s"
KEY = "minicpm.record"  # of the record, in an ASGI scope
MONITORED = ("/health", "/metrics")  # asked every few seconds: answers of 200 are logged at the level debug only


def start_log(level: str) -> None:
    """Write the log of this package from ``level`` (``debug`` to ``error``) on to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%Y-%m-%d %H:%M:%S"))
    LOG.handlers[:] = [handler]
    LOG.propagate = False
    LOG.setLevel(level.upper())


class Record:
    """A request.

    Attributes:
        status: of the response; None while there is none.
        left: whether the client disconnected before its response was complete.
        failed: whether the server had a defect.
    """

    def __init__(self, metrics: Metrics, method: str, path: str):
        self._metrics, self.method, self.path = metrics, method, path
        self.status: int | None = None
        self.left = self.failed = False
        self._prompt_tokens = 0
        self._began = time.perf_counter()
        self._times: dict[int, list[float]] = {}  # by answer: its first and its latest token
        self._tokens: dict[int, int] = {}

    def submitted(self, prompt_tokens: int) -> None:
        """The engine has accepted the request."""
        self._prompt_tokens = prompt_tokens
        self._metrics.prompt_tokens.inc(prompt_tokens)

    def token(self, answer: int, at: float) -> None:
        """A token of an answer was generated at this time of `time.perf_counter`."""
        if answer not in self._times:
            self._times[answer] = [at, at]
            self._metrics.first_token.observe(at - self._began)
        self._times[answer][1] = at
        self._tokens[answer] = self._tokens.get(answer, 0) + 1
        self._metrics.generation_tokens.inc()

    def finished(self, answer: int, reason: str) -> None:
        """An answer ended, with a reason of `Metrics.finished`."""
        self._metrics.finished(reason)
        if reason in ("stop", "length"):
            self._metrics.latency.observe(time.perf_counter() - self._began)
        if (tokens := self._tokens.get(answer, 0)) > 1:
            first, last = self._times[answer]
            self._metrics.per_token.observe((last - first) / (tokens - 1))

    def ended(self) -> None:
        """The response is complete, or nobody waits for it: write the line."""
        if self.status is not None and self.status >= 400 and not self.left:
            self._metrics.rejected(self.status)
        monitored = self.path in MONITORED and self.status == 200
        LOG.log(logging.DEBUG if monitored else logging.INFO, "%s", self)

    def __str__(self) -> str:
        path = UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", short(self.path))
        words = [self.method, path, str(self.status or "-"), f"{time.perf_counter() - self._began:.3f}s"]
        if self._prompt_tokens:
            words += [f"prompt_tokens={self._prompt_tokens}", f"completion_tokens={sum(self._tokens.values())}"]
        if self._times:
            first, last = min(t for t, _ in self._times.values()), max(t for _, t in self._times.values())
            words.append(f"first_token={first - self._began:.3f}s")
            if last > first:
                words.append(f"tokens_per_second={(sum(self._tokens.values()) - 1) / (last - first):.1f}")
        return " ".join(words + ["client=left"] * self.left + ["failed"] * self.failed)


class Recorder:
    """The outermost middleware: makes the `Record` of each request."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        record = scope[KEY] = Record(self._metrics, scope["method"], scope["path"])
        complete = False

        async def received() -> Any:
            message = await receive()
            record.left |= message["type"] == "http.disconnect" and not complete
            return message

        async def sent(message: Any) -> None:
            nonlocal complete
            if message["type"] == "http.response.start":
                record.status = message["status"]
            complete |= message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, received, sent)
        except Exception:
            record.status, record.failed = record.status or 500, True
            raise
        finally:
            record.ended()


def record_of(scope: Any) -> Record:
    return scope[KEY]


def refused(metrics: Metrics, status: int) -> None:
    """A connection was answered with this status before it sent a request."""
    metrics.rejected(status)
    LOG.info("- - %s", status)
