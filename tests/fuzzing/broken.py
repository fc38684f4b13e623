"""Readers that are known to be broken, each in one way: the harness must see it. And one that is not."""

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.archives import CANARY
from fuzzing.mutant import REFUSED, SAME, Disagreement, Expect, Reader
from weights_io.errors import InputError

FILE = "file"


def make(folder: Path) -> None:
    (folder / FILE).write_text("good")


def touched(random: Random, folder: Path) -> tuple[str, Expect]:
    (folder / FILE).write_text(f"{random.random()}")
    return "another number", SAME


def must_be_refused(random: Random, folder: Path) -> tuple[str, Expect]:
    (folder / FILE).write_text("bad")
    return "bad", REFUSED


class Panic(BaseException):
    """As pyo3's."""


def raised(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def hidden_memory_error() -> None:
    try:
        bytes(2**50)
    except MemoryError:
        raise InputError("it does not fit.") from None


def in_a_thread() -> None:
    thread = threading.Thread(target=raised(ValueError("x")))
    thread.start()
    thread.join()


def spin() -> None:
    while True:
        pass


def grow() -> None:
    kept = []
    while True:
        kept.append(b"x" * 2**20)


def write_outside() -> None:
    Path("../outside").write_text("x")


def read_outside() -> None:
    next(Path("..").glob("good-*.pickle")).read_bytes()


def two_lines() -> InputError:
    """What `InputError` itself does not let come about."""
    error = InputError("a b.")
    error.args = ("a\nb.",)
    return error


# name -> (kind that it must be found to be, what the reader does with a mutant)
WAYS: dict[str, tuple[str, Callable[[], Any]]] = {
    "value-error": ("traceback", raised(ValueError("x"))),
    "panic": ("traceback", raised(Panic("x"))),
    "exit-1": ("traceback", raised(SystemExit(1))),
    "thread": ("traceback", in_a_thread),
    "long": ("sentence", raised(InputError("x" * 500))),
    "lines": ("sentence", raised(two_lines())),
    "names": ("sentence", raised(InputError(", ".join(f"model.layers.{i}.q_proj.weight" for i in range(4))))),
    "sleep": ("hang", lambda: time.sleep(600)),
    "spin": ("hang", spin),
    "grow": ("swell", grow),
    "memory-error": ("swell", hidden_memory_error),
    "system": ("execution", lambda: os.system("true")),
    "popen": ("execution", lambda: subprocess.run(["true"])),
    "canary": ("execution", lambda: Path(CANARY).write_text("")),
    "write-outside": ("outside", write_outside),
    "read-outside": ("outside", read_outside),
    "abort": ("died", os.abort),
    "inspect": ("inspect", raised(Disagreement("x"))),
    "differs": ("differs", lambda: None),
    "refuses": ("refused", raised(InputError("file is bad; write another."))),
    "exit-2": ("refused", raised(SystemExit(2))),
}


def reading(act: Callable[[], Any]) -> Callable[[Path], str]:
    def read(folder: Path) -> str:
        text = (folder / FILE).read_text()
        if text != "good":
            act()
        return text

    return read


def of_way(name: str) -> Reader:
    seconds = 60.0 if name == "grow" else 1.0  # pages are slow to get in some sandboxes
    return Reader(name, 1, make, reading(WAYS[name][1]), [(1, touched)], seconds, needs=())


READERS = {name: of_way(name) for name in WAYS}
READERS["accepts"] = Reader("accepts", 1, make, lambda folder: "good", [(1, must_be_refused)], needs=())
READERS["reads"] = Reader("reads", 1, make, lambda folder: "good", [(1, touched)], needs=())
KINDS = {name: kind for name, (kind, _) in WAYS.items()} | {"accepts": "accepted", "reads": "read"}
