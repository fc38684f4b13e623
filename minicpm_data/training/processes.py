"""The processes of a training run, and a Ctrl-C that waits for the end of the step."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator


class SingleProcess:
    """A run with one process. JAX's `MultiProcess` has the same methods; all processes call them in the same order."""

    first = True  # whether this is process 0; only process 0 prints and writes

    @property
    def quiet(self) -> bool | None:
        """tqdm's ``disable``: True, or None to draw the bar only on a terminal."""
        return None if self.first else True

    def on_main_process(self, action: Callable[[], object]) -> None:
        """Run ``action`` in process 0 while the others wait. All processes raise the `InputError` that it raises."""
        action()

    def any(self, wanted: bool) -> bool:
        """Whether any process passes True."""
        return wanted

    def check_consistent(self, said: str) -> None:
        """Raises `InputError` in all processes where they pass different texts."""


@contextlib.contextmanager
def leaving_at_interrupts() -> Iterator[None]:
    """A context in which Ctrl-C ends the process with status 130, until a run's `Interrupt` takes over.

    A library's callback could swallow a KeyboardInterrupt. Files are written atomically, so no file is left half
    written. If Ctrl-C has another handler (`notebook.run`), that handler stays.
    """
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
    """A context in which the first Ctrl-C only sets `wanted`, so that the step is completed. A second one raises."""

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
