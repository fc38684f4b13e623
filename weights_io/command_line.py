"""Run a command line: a dataclass of options becomes flags, and an `InputError` one sentence and exit status 2."""

import contextlib
import dataclasses
import errno
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from weights_io.errors import InputError, flag

Options = TypeVar("Options")
NUMBERS, SEEDS = 2**31 - 1, 2**63 - 1  # upper bounds of whole numbers and of seeds
# Upper bounds of options by name. Larger values would exhaust the memory or run for days.
MOST = {"length": 2**21, "lengths": 2**21, "samples": 10**6, "examples": 10**6, "documents": 10**7}
MOST |= dict.fromkeys(("max_seq_length", "seq_length", "seq", "context"), 2**24)
MOST |= dict.fromkeys(("batch_size", "batch", "rank", "experts", "slots", "waiting"), 2**16)
# Commands of weights_io that need a tokenizer, which minicpm_data provides. weights_io must not import minicpm_data, so
# these modules are started by name, here and nowhere else.
ABOVE = {name: f"minicpm_data.cli.{name}" for name in ("convert", "fuse", "inspect", "upcycle")}
MANY_FILES = 10240  # open files where there is no limit; macOS accepts no larger number
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


def run(
    main: Callable[[Options], None],
    options: type[Options],
    prog: str,
    more_flags: Callable[[Options], list[str]] | None = None,
) -> None:
    """Parse ``sys.argv`` and call ``main`` with the options. Wrong flags exit with 2; see also `exit_codes`.

    Arguments:
        main: the command; its docstring is the description in the help.
        options: a dataclass whose fields are the flags; the docstrings below the fields are the help.
        prog: the command as it is typed, e.g. ``"python -m weights_io.inspect"``.
        more_flags: returns the flags of a config file that the options name; flags in ``sys.argv`` override them.
    """
    import tyro

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show 中 shows ?

    def parsed(flags: list[str]) -> Options:
        return tyro.cli(
            options, prog=prog, description=main.__doc__, args=flags, config=(tyro.conf.FlagCreatePairsOff,)
        )

    with exit_codes():
        allow_open_files()
        given = parsed(sys.argv[1:])
        if more_flags is not None and (more := more_flags(given)):
            given = parsed(more + sys.argv[1:])
        check_numbers(given)
        try:
            main(given)
        except InputError as error:
            raise InputError(as_typed(str(error), options)) from error


def command_above(name: str) -> Callable[[Any], None]:
    """The ``main`` of a command in `ABOVE`."""
    return importlib.import_module(ABOVE[name]).main


def check_numbers(options: object) -> None:
    """Raises `InputError` where an option is NaN or beyond its upper bound, which later code could not handle."""
    for name, value in vars(options).items():
        most = SEEDS if name == "seed" else MOST.get(name, NUMBERS)
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, int) and abs(number) > most:
                shown = str(number) if abs(number) < 10**40 else "a number of more than 40 digits"
                bound = f"at most {most:,}" if number > 0 else f"at least {-most:,}"
                raise InputError(f"{flag(name)} is {shown}; it must be {bound}.")
            if isinstance(number, float) and number != number:
                raise InputError(f"{flag(name)} is nan; give a number.")


def allow_open_files() -> int:
    """Raise this process's limit of open files as far as allowed, and return it."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return 1 << 16
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MANY_FILES if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= most:
        return MANY_FILES if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (ValueError, OSError):  # the system allows fewer
        return soft
    return most


def as_typed(sentence: str, options: type) -> str:
    """With the options' fields that it names as they are typed: ``--top-p`` for ``top_p``, the name in Python. Fields
    of one word may be words, what is quoted is none of ours, and in a sentence on a file, or one that names the flag,
    a name may be that of a setting of a model."""
    if re.search(r"\w/\w|\w\.(json|safetensors|gguf|bin|py)", sentence):
        return sentence
    for name in (field.name for field in dataclasses.fields(options) if "_" in field.name):
        if flag(name) not in sentence:
            sentence = re.sub(rf"(?<![\w.'\"-]){name}(?![\w'\"-]|\.\w)", flag(name), sentence)
    return sentence


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """A context that turns exceptions into exit statuses.

    - 2, with a sentence: an `InputError`, or a file that cannot be read or written;
    - 130: Ctrl-C;
    - 0: the reader of a pipe is gone (``| head``).

    Any other exception is a defect and keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except MemoryError:
        print("error: there is not enough memory; give less, such as fewer or shorter rows at once.", file=sys.stderr)
        sys.exit(2)
    except FileNotFoundError as error:
        what = error.filename or "a file, or the folder that this was started in,"  # which names no file
        print(f"error: {what} does not exist; check its name and its folder.", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            said = f"this process may have only {allow_open_files()} files open; allow more with ulimit -n 1024"
            print(f"error: {said}.", file=sys.stderr)
            sys.exit(2)
        if sys.stdout is not None:  # else the exit would fail on what is still to be written
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        what = f"{error.filename} cannot be read or written" if error.filename else "the output cannot be written"
        print(f"error: {what} ({error.strerror or error}); check its permissions and its disk.", file=sys.stderr)
        sys.exit(2)


def print_commands(package: str) -> None:
    """Each module of a package that can be run with ``python -m``, and the first sentence of what it says of itself."""
    import ast
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    with exit_codes():
        for path in sorted(Path(spec.submodule_search_locations[0]).glob("[!_]*.py")):
            source = path.read_text(encoding="utf-8")
            if '\nif __name__ == "__main__":' in source:
                said = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0].replace("\n", " ")
                print(f"python -m {package}.{path.stem:12} {said}")
