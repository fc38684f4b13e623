"""What is refused of an option's number, in one sentence that names the option."""

import math
from typing import Any

from weights_io.errors import InputError


def check_range(
    options: Any, *names: str, least: float | None = None, above: float | None = None, below: float = math.inf
) -> None:
    """`InputError` where an option of these names is not in its range: at ``least`` so much, or ``above`` it, and
    ``below`` what comes after the range. None, an option that was not given, is in any."""
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
