"""The processes that render chat templates, seen from the one that asks: started when first needed, ended with it."""

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from minicpm_data.tokenizer.template_worker import MEMORY
from weights_io.errors import InputError

START = "from minicpm_data.tokenizer.template_worker import main; main()"
PROCESSES = 4  # at most; more callers wait for one
START_SECONDS = 60.0  # on a machine that is very busy
WALL_SECONDS = 30.0  # for one prompt; the process itself counts its own seconds, which are fewer
LOOK_SECONDS = 0.05  # between looks at the memory of a process that no limit holds

TOO_MUCH = "the chat template needs more time or memory than is reasonable; give shorter messages or another template."


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that ``template`` makes of ``variables``, which are values of JSON.

    Raises `InputError` where the template fails or refuses, or takes more than its share of time, memory or text.
    """
    found = _answer({"template": template, "variables": variables})
    if "error" in found:
        raise InputError(f"the chat template cannot be applied to these messages: {found['error'].rstrip('.')}.")
    return found["text"]


@lru_cache(maxsize=16)
def variables_of(template: str) -> frozenset[str]:
    """The names that ``template`` reads and does not set. Raises `InputError` where it cannot be read within
    the limits.

    Jinja computes a template's constants to find them, of which one alone can take any time and memory.
    """
    found = _answer({"template": template})
    if "error" in found:
        raise InputError(f"the chat template cannot be read ({found['error'].rstrip('.')}); give another one.")
    return frozenset(found["names"])


def _answer(question: Mapping[str, Any]) -> dict[str, Any]:
    request = json.dumps(question, ensure_ascii=False)
    with _places:
        worker = _taken()
        try:
            answer = worker.ask(request.encode("utf-8", "surrogatepass"))
        except BaseException:
            worker.end()
            raise
        if answer is None:
            worker.end()
            raise InputError(TOO_MUCH)
        _idle.append(worker)
    return json.loads(answer)


class _Worker:
    def __init__(self) -> None:
        from multiprocessing.connection import Pipe

        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        if self._answer(START_SECONDS) is None:
            self.end()
            raise InputError("the process that renders chat templates does not start; look at this Python's packages.")

    def ask(self, request: bytes) -> bytes | None:
        """Its answer; None where it ended without one or takes too much."""
        try:
            self.connection.send_bytes(request)
        except OSError:
            return None
        return self._answer(WALL_SECONDS)

    def _answer(self, seconds: float) -> bytes | None:
        try:
            if sys.platform == "linux":  # where the process has set itself a limit of memory that holds
                return self.connection.recv_bytes() if self.connection.poll(seconds) else None
            until = time.monotonic() + seconds
            while not self.connection.poll(LOOK_SECONDS):
                if time.monotonic() > until or _resident(self.process.pid) > MEMORY:
                    return None
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            return None

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


_idle: list[_Worker] = []
_places = threading.BoundedSemaphore(PROCESSES)


def _taken() -> _Worker:
    while True:
        try:
            worker = _idle.pop()
        except IndexError:
            return _Worker()
        if worker.process.poll() is None:
            return worker
        worker.end()  # somebody else has ended it since


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where that cannot be told."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(done.stdout) * 1024 if done.stdout.strip().isdecimal() else 0


def _end_all() -> None:
    while _idle:
        _idle.pop().end()


def _forget() -> None:
    """After a fork: the processes answer the parent, and their connections are not to be shared with it."""
    global _idle, _places
    _idle, _places = [], threading.BoundedSemaphore(PROCESSES)


atexit.register(_end_all)
os.register_at_fork(after_in_child=_forget)
