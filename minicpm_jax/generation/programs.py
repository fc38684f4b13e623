"""Programs that are compiled beside the work: a table of keys, filled by one thread.

XLA compiles without Python's lock, so that running programs go on meanwhile. The thread only traces, lowers and
compiles; it runs nothing. (It has the usual priority: with a lower one it kept the lock for 2 s on a busy machine.)
`jax.jit` finds the result at its next call with these shapes, so callers call the jitted functions as usual. A shape
that nobody has asked for here is compiled at its call.
"""

import atexit
import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

_tables: "weakref.WeakSet[Programs]" = weakref.WeakSet()  # closed at the end of the process


@atexit.register
def _close_all() -> None:
    for table in list(_tables):
        table.close()


class Key(NamedTuple):
    """A program: the name of its function, and the sizes that it is compiled for."""

    name: str
    sizes: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.name, " x ".join(map(str, self.sizes))]).strip()


Done = Callable[[Key, float], None]  # a program and the seconds that it took


class Programs:
    """A table of programs. It may be used from several threads."""

    def __init__(self, compiled: Callable[[Key], object]):
        """
        Arguments:
            compiled: compiles the program of a key; called on the table's thread, for one key at a time.
        """
        self._compiled = compiled
        self._changed = threading.Condition()
        self._ready: dict[Key, object] = {}
        self._failed: dict[Key, Exception] = {}
        self._asked: deque[Key] = deque()  # a request waits for these
        self._warm: deque[Key] = deque()  # nobody waits for these yet
        self._compiling: Key | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self.changes = 0  # number of programs that became ready or failed
        self.on_change: Callable[[], None] = lambda: None  # called on the table's thread
        self.on_done: Done = lambda key, seconds: None  # likewise, after a program became ready
        _tables.add(self)

    def has(self, key: Key) -> bool:
        """Whether a program is ready."""
        return key in self._ready

    def ready(self, keys: Iterable[Key]) -> bool:
        """Whether all of these are ready. Those that are not are compiled before what is only to be warmed.

        Raises: the error of a program that could not be compiled. The next call tries it again.
        """
        with self._changed:
            missing = [key for key in keys if key not in self._ready]
            for key in missing:
                if (error := self._failed.pop(key, None)) is not None:
                    raise error
            for key in missing:
                if key not in self._asked and key != self._compiling:
                    self._asked.append(key)
            self._start()
            return not missing

    def warm(self, keys: Iterable[Key]) -> None:
        """Compile these, in this order, when nothing else is asked for."""
        with self._changed:
            known = {*self._ready, *self._asked, *self._warm, self._compiling}
            self._warm.extend(key for key in dict.fromkeys(keys) if key not in known)
            self._start()

    def claim(self, keys: Iterable[Key]) -> None:
        """Say that the caller runs these now, and compiles those that are not ready. Nothing else is begun meanwhile,
        and the one of them that is being compiled is waited for."""
        wanted = set(keys)
        with self._changed:
            self._warm.clear()
            self._changed.wait_for(lambda: self._compiling not in wanted)
            self._ready |= {key: self._ready.get(key) for key in wanted}

    def wait(self, since: int) -> None:
        """Wait until ``changes`` differs from ``since``, or nothing is being compiled."""
        with self._changed:
            self._changed.wait_for(lambda: self.changes != since or self._thread is None)

    def counts(self) -> dict[str, int]:
        """How many programs are ready, compiling and waiting."""
        with self._changed:
            waiting = {*self._asked, *self._warm} - {*self._ready, self._compiling}
            return {
                "ready": len(self._ready),
                "compiling": int(self._compiling is not None),
                "waiting": len(waiting),
            }

    def close(self) -> None:
        """Compile nothing more, and wait for the program that is being compiled, which cannot be interrupted: a
        process that exits meanwhile aborts."""
        with self._changed:
            self._closed = True
            self._asked.clear()
            self._warm.clear()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _start(self) -> None:
        """Start a thread if there is work for one. It ends with the work, so an idle table has none."""
        if self._closed or self._thread is not None or not (self._asked or self._warm):
            return
        self._thread = threading.Thread(target=self._work, name="minicpm-compile", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (found := self._next()) is not None:
            key, asked = found
            began, program, error = time.perf_counter(), None, None
            try:
                program = self._compiled(key)
            except Exception as failed:  # for the requests that need this program, and no others
                error = failed
            with self._changed:
                self._compiling = None
                if error is None:
                    self._ready[key] = program
                elif asked:  # otherwise the first request that needs it tries again
                    self._failed[key] = error
                self.changes += 1
                self._changed.notify_all()
            with contextlib.suppress(OSError):  # a closed terminal
                if error is None:
                    self.on_done(key, time.perf_counter() - began)
            self.on_change()

    def _next(self) -> tuple[Key, bool] | None:
        """The program to compile now, and whether a request waits for it; None, and the thread is over, where there is
        none."""
        with self._changed:
            while self._asked or self._warm:
                asked = bool(self._asked)
                key = (self._asked or self._warm).popleft()
                if key not in self._ready:
                    self._compiling = key
                    return key, asked
            self._thread = None
            self._changed.notify_all()
            return None
