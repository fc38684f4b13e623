"""What a command does when the device fails: it ends with a sentence and exit code 1, so that a supervisor starts it
again. The open requests have got the error before."""

import sys

from minicpm_serve.delivery import EngineClosed
from minicpm_serve.engine import ServingEngine
from weights_io.errors import short

CODE = 1  # 2 is for bad input


def failed(engine: ServingEngine) -> bool:
    """Whether an error of the device has stopped the engine."""
    return engine.error is not None and not isinstance(engine.error, EngineClosed)


def end_if_failed(engine: ServingEngine) -> None:
    """Say what failed and exit, if something has."""
    if not failed(engine):
        return
    error = engine.error
    said = " ".join(str(error).split())
    print(
        f"error: the device failed ({type(error).__name__}: {short(said)}); start the command again.", file=sys.stderr
    )
    raise SystemExit(CODE)
