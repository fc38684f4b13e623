"""Range checks of options."""

import math
from pathlib import Path
from typing import Any

from weights_io.errors import InputError


def check_new_file(path: Path, option: str, ending: str) -> None:
    """Raises `InputError` unless ``path`` has the ending and its folder exists; called before the work begins."""
    if path.suffix.lower() != ending:
        raise InputError(f"is {path}; give the name of a {ending} file.", option)
    if path.is_dir() or not path.expanduser().absolute().parent.is_dir():
        raise InputError(f"is {path}, which is a folder or in one that does not exist; make it first.", option)


def check_range(
    options: Any, *names: str, least: float | None = None, above: float | None = None, below: float = math.inf
) -> None:
    """Check that options are inside their range. None is always accepted.

    Arguments:
        options: the dataclass.
        names: the fields to check.
        least: the smallest allowed value.
        above: values must be above this number.
        below: values must be below this number.

    Raises:
        InputError: an option is outside its range. The message names the flag.
    """
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        wrong = None
        if least is not None and not value >= least:
            wrong = f"at least {least}"
        elif above is not None and not value > above:
            wrong = f"above {above}"
        elif not value < below:
            wrong = "finite" if below == math.inf else f"below {below}"
        if wrong is not None:
            raise InputError(f"is {value}; it must be {wrong}.", name)
