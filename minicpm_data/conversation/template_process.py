"""Start and call the processes that render chat templates. They start when first needed and end with the caller."""

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

from minicpm_data.conversation.template_worker import MEMORY
from weights_io.errors import InputError

START = "from minicpm_data.conversation.template_worker import main; main()"
PROCESSES = 4  # at most; further callers wait for a free one
START_SECONDS = 60.0  # for a process to start on a very busy machine
WALL_SECONDS = 30.0  # for one prompt; the process has a smaller limit of its own, in seconds of CPU time
LOOK_SECONDS = 0.05  # between checks of a process's memory, where the system enforces no limit

TOO_MUCH = "the chat template needs more time or memory than is reasonable; give shorter messages or another template."


def render(template: str, variables: Mapping[str, Any], hidden: Mapping[str, str] | None = None) -> str:
    """Render a chat template in one of the processes.

    Arguments:
        template: Jinja source.
        variables: JSON values.
        hidden: characters in them -> the characters that the template's tests see in their place.

    Returns:
        The text of the prompt.

    Raises:
        InputError: the template fails, raises an exception of its own, or exceeds a limit of time, memory or text.
    """
    found = _answer({"template": template, "variables": variables, "hidden": hidden or {}})
    if "error" in found:
        raise InputError(f"the chat template cannot be applied to these messages: {found['error'].rstrip('.')}.")
    return found["text"]


@lru_cache(maxsize=16)
def variables_of(template: str) -> frozenset[str]:
    """The variables that ``template`` reads and does not set. Raises `InputError` where it cannot be parsed within the
    limits.

    To find them, Jinja evaluates the template's constants. A single one can take unlimited time and memory.
    """
    found = _answer({"template": template})
    if "error" in found:
        raise InputError(f"the chat template cannot be read ({found['error'].rstrip('.')}); give another one.")
    return frozenset(found["names"])


def _answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a process to a question. Raises `InputError` where a limit is exceeded."""
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
    """A process that renders templates, and the connection to it."""

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
        """The answer to a request; None where the process ended without one or exceeds a limit."""
        try:
            self.connection.send_bytes(request)
        except OSError:
            return None
        return self._answer(WALL_SECONDS)

    def _answer(self, seconds: float) -> bytes | None:
        try:
            if sys.platform == "linux":  # where the process has set its own memory limit, which is enforced
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
    """An idle process that still runs, or else a new one."""
    while True:
        try:
            worker = _idle.pop()
        except IndexError:
            return _Worker()
        if worker.process.poll() is None:
            return worker
        worker.end()  # another program has ended it since


def _resident(pid: int) -> int:
    """Resident memory of a process in bytes; 0 where it is unknown."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(done.stdout) * 1024 if done.stdout.strip().isdecimal() else 0


def _end_all() -> None:
    while _idle:
        _idle.pop().end()


def _forget() -> None:
    """After a fork, forget the processes: they answer the parent, and their connections must not be shared with it."""
    global _idle, _places
    _idle, _places = [], threading.BoundedSemaphore(PROCESSES)


atexit.register(_end_all)
os.register_at_fork(after_in_child=_forget)
