"""Every command line of the project: a dataclass of options becomes flags, an InputError one sentence and exit 2."""

import io
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from weights_io.errors import InputError

Options = TypeVar("Options")


def run(main: Callable[[Options], None], options: type[Options], prog: str) -> None:
    """Parse ``sys.argv`` into ``options`` (a dataclass; its docstrings are the help) and call ``main`` with it.

    ``prog`` is how the command is typed, e.g. ``"python -m weights_io.inspect"``. Wrong flags and `InputError` exit
    with 2, Ctrl-C with 130, a reader that went away (``| head``) with 0; any other exception is a defect of ours and
    keeps its traceback.
    """
    import tyro

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no 中 shows ?
    try:
        main(tyro.cli(options, prog=prog, description=main.__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
