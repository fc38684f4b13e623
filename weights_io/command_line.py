"""Every command line of the project: a dataclass of options becomes flags, an InputError one sentence and exit 2."""

import io
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from weights_io.errors import InputError

Options = TypeVar("Options")


def run(
    main: Callable[[Options], None],
    options: type[Options],
    prog: str,
    more_flags: Callable[[Options], list[str]] | None = None,
) -> None:
    """Parse ``sys.argv`` into ``options`` (a dataclass; its docstrings are the help) and call ``main`` with it.

    ``prog`` is how the command is typed, e.g. ``"python -m weights_io.inspect"``. ``more_flags``: given the options,
    the flags of a file that they name, which count where ``sys.argv`` does not say otherwise. Wrong flags and
    `InputError` exit with 2, and so do files that cannot be read or written; Ctrl-C exits with 130, a reader that went
    away (``| head``) with 0; any other exception is a defect of ours and keeps its traceback.
    """
    import tyro

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no 中 shows ?

    def parsed(flags: list[str]) -> Options:
        return tyro.cli(
            options, prog=prog, description=main.__doc__, args=flags, config=(tyro.conf.FlagCreatePairsOff,)
        )

    try:
        given = parsed(sys.argv[1:])
        if more_flags is not None and (more := more_flags(given)):
            given = parsed(more + sys.argv[1:])
        main(given)
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except OSError as error:
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
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("[!_]*.py")):
        source = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in source:
            said = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0].replace("\n", " ")
            print(f"python -m {package}.{path.stem:12} {said}")
