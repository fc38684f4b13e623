"""Mutants through a worker process, whose time and memory are watched from outside: Linux's /proc says them."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuzzing.mutant import Reader

TESTS = Path(__file__).parent.parent
POLL = 0.02  # seconds: memory grows by some 100 MB meanwhile
TICK = 1 / os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
SETUP = 300.0  # seconds that a worker may take to begin, on a machine that is busy
PROGRAM = "import pathlib, sys; from fuzzing.worker import main; main(sys.argv[1], pathlib.Path(sys.argv[2]))"
FINE = ("refused", "read")


@dataclass(frozen=True)
class Limits:
    asleep: float = 5.0  # seconds in which nothing is computed
    memory: int = 1536 * 2**20  # bytes more than before
    cpu: float | None = None  # seconds; None: the reader's own


@dataclass(frozen=True)
class Outcome:
    name: str  # READER:NUMBER
    made: str  # what was done to the good files
    kind: str  # see the package's docstring; refused and read are fine
    said: str
    seconds: float

    @property
    def fine(self) -> bool:
        return self.kind in FINE

    def line(self) -> str:
        again = f"python -m pytest tests/test_fuzz.py -m fuzz --mutant {self.name}"
        return f"{self.kind}: {self.said}\n    {self.name}: {self.made}\n    {again}"


@dataclass(frozen=True)
class Used:
    """What a process has used so far."""

    cpu: float
    memory: int
    waiting: bool  # neither it nor a process that it started computes or waits for a disk
    of_others: float  # seconds of CPU of the processes that it started, which have limits of their own


class Ended(Exception):
    """The worker was ended, or ended by itself; the text is ``KIND: why``."""


class Worker:
    def __init__(self, module: str, work: Path, limits: Limits):
        self.limits = limits
        search = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        quiet = {
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONSAFEPATH": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        alone = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, module, str(work.resolve())],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **quiet, **alone, "PYTHONPATH": search},
            cwd=TESTS,
        )
        self.printed = work / f"printed-{self.process.pid}"

    def run(self, reader: Reader, number: int) -> Outcome:
        """One mutant. Raises `Ended` where there is no worker after it."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{reader.name} {number}\n".encode())
        self.process.stdin.flush()
        began = time.monotonic()
        made = "not made"
        try:
            try:
                made = json.loads(self.answer(began + SETUP))["made"]
            except Ended as ended:  # not of the mutant's reading: the harness itself is at fault
                raise AssertionError(f"{reader.name}:{number} could not be made: {ended}\n{self.said()}") from None
            began = time.monotonic()
            found = json.loads(self.watched(reader))
        except Ended as ended:
            kind, _, why = str(ended).partition(": ")
            self.close()
            return Outcome(f"{reader.name}:{number}", made, kind, why, time.monotonic() - began)
        return Outcome(f"{reader.name}:{number}", made, found["kind"], found["said"], time.monotonic() - began)

    def watched(self, reader: Reader) -> str:
        """The worker's next line, while it stays within the limits."""
        before = last = used(self.process.pid)
        asleep, most = 0.0, self.limits.cpu or reader.seconds
        while (line := self.line(POLL)) is None:
            now = used(self.process.pid)
            if now is None or before is None or last is None:
                raise Ended(f"died: the process ended with {self.process.wait()}, having said {self.said()[-200:]!r}")
            asleep = asleep + POLL if now.waiting and (now.cpu, now.of_others) == (last.cpu, last.of_others) else 0.0
            last = now
            if now.memory - before.memory > self.limits.memory:
                raise Ended(f"swell: it took {(now.memory - before.memory) / 2**20:.0f} MB more than before")
            if now.cpu - before.cpu > most:
                raise Ended(f"hang: it had computed for {now.cpu - before.cpu:.0f} s")
            if asleep > self.limits.asleep:
                raise Ended(f"hang: it had waited for {asleep:.0f} s")
        return line

    def answer(self, end: float) -> str:
        """The worker's next line, before the time ``end``."""
        while (line := self.line(POLL)) is None:
            if time.monotonic() > end:
                raise Ended("hang: no answer")
        return line

    def line(self, seconds: float) -> str | None:
        """The next line; None where there is none yet. Raises `Ended` where none will come."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        found = self.process.stdout.readline()
        if not found:
            raise Ended(f"died: the process ended with {self.process.wait()}, having said {self.said()[-200:]!r}")
        return found.decode()

    def said(self) -> str:
        """What it has printed."""
        return self.printed.read_text(errors="replace")[-4000:] if self.printed.exists() else ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def used(pid: int) -> Used | None:
    """None where the process is gone."""
    fields = _stat(pid)
    if fields is None:
        return None
    cpu, memory = _cpu(fields), int(fields[21]) * PAGE
    if fields[0] != "S":
        return Used(cpu, memory, False, 0)
    started = [found for path in Path("/proc").glob("[0-9]*") if (found := _stat(path.name)) and int(found[1]) == pid]
    return Used(cpu, memory, all(found[0] == "S" for found in started), sum(map(_cpu, started)))


def _stat(pid: int | str) -> list[str] | None:
    """The fields of /proc/PID/stat from its state on; None where the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields


def _cpu(fields: list[str]) -> float:
    return (int(fields[11]) + int(fields[12])) * TICK


class Pool:
    """A worker, and another one after it. ``module``: where they find the readers; ``work``: an empty folder."""

    def __init__(self, work: Path, module: str = "fuzzing.readers", limits: Limits | None = None):
        self.work, self.module, self.limits = work, module, limits or Limits()
        self.worker: Worker | None = None

    def run(self, mutants: Iterable[tuple[Reader, int]]) -> Iterator[Outcome]:
        """What comes of each."""
        for reader, number in mutants:
            self.worker = self.worker or Worker(self.module, self.work, self.limits)
            found = self.worker.run(reader, number)
            if self.worker.process.poll() is not None:
                self.worker = None
            yield replace(found, said=found.said.replace(str(self.work), "..."))

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()


def report(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """How many of each kind."""
    counts: dict[str, int] = {}
    for found in outcomes:
        counts[found.kind] = counts.get(found.kind, 0) + 1
    return counts
