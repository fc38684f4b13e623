"""A training run's processes: what is done once where several train together, and Ctrl-C that waits for the end of a
step."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator


class SingleProcess:
    """The processes of a run: one. A backend that knows of several has its own of this form; all of them call the same
    methods in the same order."""

    first = True  # whether this process prints and writes

    @property
    def quiet(self) -> bool | None:
        """What tqdm is told of its bar: disabled (True), or drawn only on a terminal (None), not into log files."""
        return None if self.first else True

    def on_main_process(self, action: Callable[[], object]) -> None:
        """Do it in the first process, while the others wait. What it raises for the user, all raise."""
        action()

    def any(self, wanted: bool) -> bool:
        """Whether one of the processes wants it."""
        return wanted

    def check_consistent(self, said: str) -> None:
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
