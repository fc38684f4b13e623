"""What a command says while it works: a bar where the amount is known, else a line with the time. On standard error."""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from weights_io.checkpoint import Checkpoint
from weights_io.memory import size

Item = TypeVar("Item")
PATIENCE = 1.0  # seconds of silence after which a word is due
_silenced: list[threading.Event] = []  # of the lines that are shown now; a bar takes their place


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A context that says what takes so long, if it takes more than a second.

    A terminal shows ``what`` and the seconds, until the context ends or a bar takes its place. A file or pipe gets one
    plain line.
    """
    stream, done = sys.stderr, threading.Event()
    if stream is None:
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
            while True:
                print(f"\r{what} .. {time.monotonic() - began:.0f} s", end="", file=stream, flush=True)
                if done.wait(1):
                    break
            print("\r\x1b[K", end="", file=stream, flush=True)  # the line is cleared

    speaker = threading.Thread(target=say, daemon=True)
    _silenced.append(done)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        _silenced.remove(done)
        speaker.join()


def awaited(what: str, items: Iterable[Item]) -> Iterator[Item]:
    """The same items; while the first one is awaited, `waiting` says so."""
    iterator = iter(items)
    with waiting(what):
        first = list(zip(iterator, range(1), strict=False))
    for item, _ in first:
        yield item
        yield from iterator


@contextlib.contextmanager
def progress_bar(what: str, total: int, unit: str = "B") -> Iterator[Any]:
    """A `tqdm.tqdm` over ``total`` bytes or other units, as a context manager.

    It is drawn only on a terminal; a bar of bytes only where the work takes longer than a second. A file or pipe gets
    one plain line where the work takes longer than that.
    """
    from tqdm import tqdm

    for line in _silenced:
        line.set()
    of_bytes = unit == "B"
    how: dict[str, Any] = {"unit": unit, "unit_scale": of_bytes, "delay": 1 if of_bytes else 0}
    amount = size(total) if of_bytes else f"{total:,} {unit.strip()}"
    with tqdm(total=total, desc=what, disable=None, **how) as bar:  # None: only on a terminal
        with waiting(f"{what}: {amount}") if bar.disable else contextlib.nullcontext():
            yield bar


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
