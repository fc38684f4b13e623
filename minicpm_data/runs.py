"""A training run's folder: the settings that a resumed run must share, Ctrl-C that waits for the end of a step, and
what is done once where several processes train together."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from weights_io.config import read_json
from weights_io.errors import InputError

SETTINGS = "settings.json"
Own = Callable[[int], Sequence[int]]  # which of so many rows this process makes, in order; the others make the rest


def check_folder(folder: Path, resume: bool = True) -> bool:
    """Whether the folder holds a run to go on with; one that ended before it saved anything is none.

    ``resume``: a run that is there is gone on with. Raises `InputError` where it is not to be, or where the folder
    holds something else.
    """
    if folder.is_file():
        raise InputError(f"{folder} is a file; choose a folder.")
    if not (folder / SETTINGS).exists():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run to go on with; choose another folder.")
        return False
    begun = any(path.name.isdigit() for path in folder.glob("checkpoints/*"))
    if begun and not resume:
        raise InputError(f"{folder} holds a run; --resume goes on with it, or choose another folder.")
    return begun


def check_settings(
    folder: Path, settings: dict[str, Any], resume: bool = True, notes: dict[str, Any] | None = None
) -> None:
    """Write the settings of a new run into its folder, or compare them with those of the run that is there. ``notes``
    are written beside them and not compared.

    Raises `InputError` as `check_folder` does, and where the settings are others.
    """
    path = folder / SETTINGS
    if check_folder(folder, resume):
        before = read_json(path)
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise InputError(
                f"{folder} holds a run with another {', '.join(changed)}; choose another folder, or delete this one."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(settings | {"notes": notes or {}}, indent=1), encoding="utf-8")
    partial.replace(path)


def damaged(checkpoints: Path, steps: Sequence[int], reason: object) -> str:
    """The sentence for a last checkpoint (of ``steps``) that cannot be read."""
    *earlier, last = sorted(steps)
    remedy = f"--resume goes on from step {earlier[-1]}" if earlier else "begin anew"
    return f"the checkpoint of step {last} cannot be read ({reason}); delete {checkpoints / str(last)} and {remedy}."


class Alone:
    """The processes of a run: one. A backend that knows of several has its own of this form; all of them call the same
    methods in the same order."""

    first = True  # whether this process prints and writes

    @property
    def quiet(self) -> bool | None:
        """What tqdm is told of its bar: disabled (True), or drawn only on a terminal (None), not into log files."""
        return None if self.first else True

    def once(self, action: Callable[[], object]) -> None:
        """Do it in the first process, while the others wait. What it raises for the user, all raise."""
        action()

    def any(self, wanted: bool) -> bool:
        """Whether one of the processes wants it."""
        return wanted

    def check_same(self, said: str) -> None:
        """`InputError` in all of them where they say different things."""


@contextlib.contextmanager
def leaving_at_interrupts() -> Iterator[None]:
    """Within it, and until a run's `Interrupt`, Ctrl-C ends the process, with status 130. As an exception it could come
    up in a callback of a library, which swallows it. Whatever is written by then is there whole or not at all. Where
    somebody else handles it (`notebook.run`), nothing changes."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def leave(*_: object) -> None:
        print(file=sys.stderr, flush=True)
        os._exit(130)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Interrupt:
    """A context in which Ctrl-C only sets `wanted`, so that no step is cut in two; a second one stops at once."""

    def __init__(self) -> None:
        self.wanted = False

    def __enter__(self) -> "Interrupt":
        def interrupt(*_: object) -> None:
            if self.wanted:
                raise KeyboardInterrupt
            self.wanted = True

        self._before = signal.signal(signal.SIGINT, interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)
