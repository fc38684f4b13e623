"""What a command says while it works: a bar where the amount is known, else a line with the time. On standard error."""

import contextlib
import dataclasses
import itertools
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from weights_io.checkpoint import Checkpoint
from weights_io.memory import size

Item = TypeVar("Item")
PATIENCE = 0.7  # seconds of silence after which a word is due
_quiet = False  # in processes other than the first of several
_shown: list[Callable[[], None]] = []  # each ends a line that is shown now; a bar takes its place


def hush(quiet: bool) -> None:
    """Say nothing more in this process, if ``quiet``: of several processes, only the first one speaks."""
    global _quiet
    _quiet = quiet


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A context that says what takes so long, if it takes about a second or more.

    A terminal shows ``what`` and the seconds, until the context ends or a bar takes its place. A file or pipe gets one
    plain line.
    """
    stream, done = sys.stderr, threading.Event()
    if stream is None or _quiet:
        yield
        return

    def say() -> None:
        began = time.monotonic()
        if done.wait(PATIENCE):
            return
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            if not stream.isatty():
                print(f"{what} ..", file=stream, flush=True)
                return
            room = max(20, shutil.get_terminal_size().columns - 12)  # a folded line could not be cleared
            text = what if len(what) <= room else f"{what[: room - 3]}..."
            while True:
                print(f"\r{text} .. {time.monotonic() - began:.0f} s", end="", file=stream, flush=True)
                if done.wait(1):
                    break
            print("\r\x1b[K", end="", file=stream, flush=True)  # the line is cleared

    speaker = threading.Thread(target=say, daemon=True)

    def end() -> None:
        done.set()
        speaker.join()

    _shown.append(end)
    speaker.start()
    try:
        yield
    finally:
        _shown.remove(end)
        end()


def awaited(what: str, items: Iterable[Item]) -> Iterator[Item]:
    """The same items; while the first one is awaited, `waiting` says so."""
    iterator = iter(items)
    with waiting(what):
        first = list(itertools.islice(iterator, 1))
    yield from first
    yield from iterator


@contextlib.contextmanager
def progress_bar(what: str, total: int, unit: str = "B") -> Iterator[Any]:
    """A `tqdm.tqdm` over ``total`` bytes, or units such as ``"question"``, as a context manager.

    It is drawn only on a terminal; a bar of bytes only where the work takes longer than a second. A file or pipe gets
    one plain line where the work takes longer than that.
    """
    from tqdm import tqdm

    for end in _shown:
        end()
    of_bytes = unit == "B"
    how: dict[str, Any] = {"unit": unit, "unit_scale": of_bytes, "delay": 1 if of_bytes else 0}
    amount = size(total) if of_bytes else f"{total:,} {unit}{'s' * (total != 1)}"
    with tqdm(total=total, desc=what, disable=_quiet or None, **how) as bar:  # None: only on a terminal
        if bar.disable:
            with waiting(f"{what}: {amount}"):
                yield bar
            return
        with ticking(bar):
            yield bar


@contextlib.contextmanager
def ticking(bar: Any) -> Iterator[None]:
    """A context in which the time of a `tqdm.tqdm` goes on while a step takes long, as while JAX compiles."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1):
            bar.refresh()

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()


@contextlib.contextmanager
def doing(bar: Any, what: str) -> Iterator[None]:
    """A context in which a `tqdm.tqdm` says what is done. `waiting` says it where no bar is drawn."""
    if bar.disable:
        with waiting(what):
            yield
        return
    bar.set_description(f"{what} ..")
    try:
        yield
    finally:
        bar.set_description("")


@contextlib.contextmanager
def reading(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """The checkpoint with a progress bar over its bytes, which every read advances, from any thread.

    Where several processes load a model, each reads a part, and its bar ends early.
    """
    with progress_bar("loading", checkpoint.nbytes) as bar:

        def on_read(count: int) -> None:
            with bar.get_lock():
                bar.update(count)

        yield dataclasses.replace(checkpoint, on_read=on_read)
