"""Start a command by its name: ``python -m minicpm_mlx generate ...`` and ``minicpm-mlx generate ...``."""

import difflib
import runpy
import sys
import textwrap
from pathlib import Path

from weights_io import command_line
from weights_io.command_line import SCRIPTS, commands_of
from weights_io.errors import InputError

WIDTH = 100  # of the list of commands


def script() -> None:
    """The entry point of the console scripts, each of which starts the commands of its package in `SCRIPTS`."""
    name = Path(sys.argv[0]).stem
    launch(SCRIPTS[name], name)


def launch(package: str, prog: str) -> None:
    """Run the command that the first word of ``sys.argv`` names, or list the commands.

    Arguments:
        package: the package of the commands.
        prog: what the user typed before the command's name.

    Raises:
        SystemExit: with 2 for a name that is no command; else as the command.
    """
    with command_line.exit_codes():
        doors = commands_of(package)
        if not sys.argv[1:] or sys.argv[1] in ("-h", "--help", "help"):
            print("\n".join(listing(doors, prog)))
            return
        typed = sys.argv[1]
        name = typed.replace("-", "_")
        if name not in doors:
            near = difflib.get_close_matches(name, doors, n=1)
            remedy = f"did you mean {prog} {near[0]}?" if near else f"{prog} --help lists them."
            raise InputError(f"{typed!r} is not a command of {prog}; {remedy}")
        sys.argv[:] = [f"{prog} {typed}", *sys.argv[2:]]
        with command_line.started_as(f"{prog} {typed}"):
            try:
                runpy.run_module(f"{package}.{name}", run_name="__main__", alter_sys=True)
            except ModuleNotFoundError:  # a defect of the installation
                raise
            except ImportError as error:  # the package says which extra to install
                raise InputError(str(error)) from None


def listing(doors: dict[str, str], prog: str) -> list[str]:
    """The commands, one line each, with the beginning of their descriptions."""
    width = max(map(len, doors), default=0)
    lines = [f"usage: {prog} COMMAND [options]; {prog} COMMAND --help lists its options", ""]
    return lines + [
        f"  {name:{width}}  {textwrap.shorten(said, WIDTH - width, placeholder=' ..')}" for name, said in doors.items()
    ]
