"""What a notebook needs, whichever backend it runs on: its first cell's check, and commands in its own process."""

import os
import runpy
import shlex
import shutil
import signal
import sys
import warnings
from pathlib import Path

from weights_io.errors import InputError

# In the environment: a notebook may run on the CPU. That is slow, and meant for tests, where JAX has several devices
# that are not there (XLA_FLAGS=--xla_force_host_platform_device_count=8).
ON_CPU = "MINICPM_NOTEBOOK_CPU"


def accept_cpu(wanted: str, remedy: str) -> str:
    """What to print of a runtime that is only a CPU. Raises `InputError` with the remedy unless the environment says
    that a CPU will do."""
    if os.environ.get(ON_CPU, "0") in ("", "0"):
        raise InputError(f"this notebook wants {wanted}, and there is only a CPU; {remedy} (or set {ON_CPU}=1, slow).")
    return f"on the CPU, because {ON_CPU} is set: nothing here says how fast {wanted} is"


def run(command: str) -> None:
    """A command line (``python -m minicpm_jax.lora --data ...``) in this process: a TPU serves one process alone.

    It may go over several lines. Raises `InputError` where it ends with an error, which it has then printed.
    """
    python, flag, module, *arguments = shlex.split(command)
    if (python, flag) != ("python", "-m"):
        raise InputError(f"{command} does not begin with python -m; give a command of a module.")
    before, sys.argv = sys.argv, [module, *arguments]
    handler = signal.signal(signal.SIGINT, _interrupt)  # a command must not end the notebook
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # it may be the second time
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise InputError(f"python -m {module} ended with {end.code}; what it printed says why.") from None
    finally:
        sys.argv = before
        signal.signal(signal.SIGINT, handler)


def fresh(*names: str, keep: str = "") -> None:
    """Remove what an earlier run of a cell wrote: folders by name, which lie beside the notebook. Raises `InputError`
    where the model ``keep`` is in one of them, before anything is removed."""
    kept = Path(keep).expanduser().resolve()
    for name in names:
        if Path(name).name != name or keep and kept.is_relative_to(Path(name).resolve()):
            raise InputError(f"{name} would be written anew, and {keep or 'it'} is not to be lost; rename it first.")
    for name in names:
        shutil.rmtree(name, ignore_errors=True)


def of_a_clone(path: str) -> Path | None:
    """A file of the project that is not installed: in the clone that this package runs from, that the notebook lies in,
    or that lies beside it. None where there is none."""
    clones = Path(__file__).parent.parent, Path(), Path(".."), Path("minicpm-jax-mlx")
    return next(((clone / path).resolve() for clone in clones if (clone / path).exists()), None)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
