"""A process that makes mutants and reads them, one after the other, as it is told on its standard input.

`main` is its program: ``module`` has the ``READERS``, in ``work`` lie good files and mutants. A line on the input is
``READER NUMBER``; the answer is two lines of JSON on the output: what the mutant is (from then on the limits count),
and what came of it.
"""

import contextlib
import gc
import importlib
import json
import os
import pickle
import re
import resource
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzzing.archives import CANARY
from fuzzing.mutant import Disagreement, Expect, Reader, copy, same

LONGEST = 400  # characters of a refusal, its folder not counted
MOST_NAMES = 3
ROOM = 8 * 2**30  # bytes of address space beyond those that are in use
EXECUTE = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile")
EXECUTE += ("subprocess.Popen", "pty.spawn", "pickle.find_class", "ctypes.dlopen", "webbrowser.open")
NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "urllib.Request")
CHANGE = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
)
CHANGE += ("shutil.rmtree", "shutil.copyfile", "shutil.move")


class Stopped(BaseException):
    """What a mutant wanted to do was not done."""


class Watch:
    """What is done while a mutant is read that no reading needs. An audit hook can never be taken away, so this one
    only looks while it is `armed`."""

    def __init__(self, work: Path):
        self.work, self.folder = work, work
        self.armed = self.loopback = False
        self.seen: list[tuple[str, str]] = []
        caches = [os.environ.get("JAX_COMPILATION_CACHE_DIR"), "/dev/null", "/dev/tty"]
        self.allowed = tuple(path for path in caches if path)
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or (event == "subprocess.Popen" and renders(arguments)):
            return
        if event in EXECUTE or (event in NETWORK and not self.loopback):
            if event == "ctypes.dlopen" and not str(arguments[0]).startswith(str(self.work)):
                return  # libraries load their own parts late
            self.seen.append(("execution", f"{event} {arguments!r:.200}"))
            raise Stopped(event)
        if event == "open" and not isinstance(arguments[0], int):
            path, mode, flags = arguments
            writing = any(letter in (mode or "") for letter in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
            self.look(path, "written" if writing else "read")
        elif event in CHANGE:
            for path in arguments:
                if isinstance(path, str | bytes | os.PathLike):
                    self.look(path, "changed")

    def look(self, path: Any, done: str) -> None:
        where = os.path.abspath(os.fsdecode(path))
        if where == str(self.folder) or where.startswith((f"{self.folder}/", *self.allowed)):
            return
        if done != "read" or where.startswith(f"{self.work}/"):
            self.seen.append(("outside", f"{where} {done}"))

    @contextlib.contextmanager
    def over(self, folder: Path, loopback: bool) -> Iterator[None]:
        self.folder, self.loopback, self.seen = folder, loopback, []
        self.armed = True
        try:
            yield
        finally:
            self.armed = False


WATCH: Watch


def renders(popen: tuple[Any, ...]) -> bool:
    """Whether a process that is about to be started is the one that renders chat templates: a program of the project's
    own, which gets nothing of the mutant but the text of the template."""
    from minicpm_data.conversation.template_process import START

    executable, command = popen[:2]
    return executable == sys.executable and list(command[:4]) == [sys.executable, "-P", "-c", START]


def touched() -> None:
    """What a pickle may call that wants to be noticed."""
    WATCH.seen.append(("execution", "a function that the file names was called"))


class Good:
    """The good files of a reader, and what is read of them. Both are made once, and found by later workers."""

    def __init__(self, reader: Reader, work: Path):
        self.reader, self.folder = reader, work / f"good-{reader.name}"
        answer = work / f"good-{reader.name}.pickle"
        if not answer.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            reader.make(self.folder)
        found = self.read_copy(work)
        if not answer.exists():
            answer.write_bytes(pickle.dumps(found))
        self.answer = pickle.loads(answer.read_bytes())

    def read_copy(self, work: Path) -> Any:
        """Also what imports and compiles all that is needed, before limits count."""
        folder = work / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        copy(self.folder, folder)
        with contextlib.chdir(folder):
            return self.reader.read(folder)


def faults_of(message: str, folder: Path) -> str | None:
    """Why a refusal is no short sentence; None where it is."""
    message = message.replace(str(folder), "...")
    if len(message) > LONGEST:
        return f"it has {len(message)} characters"
    if any(ord(letter) < 32 or 0x7F <= ord(letter) < 0xA0 for letter in message):
        return "it has line breaks or control characters"
    names = set(re.findall(r"\b\w+(?:\.\w+){2,}\.(?:weight|bias)\b", message))
    return f"it has {len(names)} names of tensors" if len(names) > MOST_NAMES else None


def behind(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came of."""
    known: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and found not in known:
            known.append(found)
            yield found
            waiting += [found.__cause__, found.__context__]


def outcome(good: Good, folder: Path, expect: Expect, printed: Path) -> dict[str, str]:
    """Read the mutant in ``folder``: {"kind": ..., "said": ...}; the kinds refused and read are no failures."""
    from weights_io.errors import InputError

    reader, result, error = good.reader, None, None
    with WATCH.over(folder, reader.loopback), contextlib.chdir(folder):
        try:
            result = reader.read(folder)
        except BaseException as caught:  # a Rust panic is none of Exception
            error = caught
    sys.stdout.flush()
    sys.stderr.flush()
    said = printed.read_text(errors="replace")
    if not WATCH.seen and next(folder.rglob(CANARY), None) is not None:
        WATCH.seen.append(("execution", f"the file {CANARY} was made"))
    if WATCH.seen:
        kind, what = WATCH.seen[0]
        return {"kind": kind, "said": what}
    if error is not None and any(isinstance(cause, MemoryError) for cause in behind(error)):
        return {"kind": "swell", "said": f"MemoryError behind {error!r:.300}"}
    if isinstance(error, Disagreement):
        return {"kind": "inspect", "said": str(error)}
    exited = isinstance(error, SystemExit) and error.code == 2
    if error is not None and not exited and not isinstance(error, InputError):
        return {"kind": "traceback", "said": _tail(error)}
    if "Traceback (most recent call last)" in said or "panicked at" in said:
        return {"kind": "traceback", "said": f"printed: {said[-600:]}"}
    if error is not None:
        sentences = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
        message = str(error) if not exited else sentences[-1] if sentences else ""  # tyro's own are not ours
        fault = faults_of(message, folder)
        return {"kind": "sentence" if fault else "refused", "said": f"{fault}: {message:.300}" if fault else message}
    if expect is Expect.REFUSED:
        return {"kind": "accepted", "said": "read, and was to be refused"}
    if expect is Expect.SAME and not same(result, good.answer):
        return {"kind": "differs", "said": _difference(result, good.answer)}
    return {"kind": "read", "said": ""}


def _tail(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__}: {str(error)[:200]!r} at {places}"


def _difference(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        parts = [str(key) for key in expected if key not in found or not same(found[key], expected[key])]
        return f"{', '.join(parts[:5])} differ" if parts else "there is more than before"
    return f"{str(found)[:150]} in place of {str(expected)[:150]}"


def main(module: str, work: Path) -> None:
    global WATCH
    answers = os.fdopen(os.dup(1), "w")
    printed = work / f"printed-{os.getpid()}"
    at = os.open(printed, os.O_CREAT | os.O_RDWR | os.O_APPEND)
    os.dup2(at, 1)
    os.dup2(at, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    WATCH = Watch(work)
    readers = importlib.import_module(module).READERS
    goods: dict[str, Good] = {}

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    for line in sys.stdin:
        name, number = line.split()
        if name not in goods:
            goods[name] = Good(readers[name], work)
        folder = work / "mutant"
        shutil.rmtree(folder, ignore_errors=True)
        copy(goods[name].folder, folder)
        said, expect = goods[name].reader.mutate(int(number), folder)
        gc.collect()
        os.ftruncate(at, 0)
        limit_room()
        answer(made=said, expect=expect.name)
        answer(**outcome(goods[name], folder, expect, printed))


def limit_room() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
