"""The two backends by name, each imported when it is asked for."""

import importlib
from types import ModuleType
from typing import Literal

from minicpm_data.generation import Backend
from weights_io.errors import InputError

BackendName = Literal["jax", "mlx"]


def module(backend: BackendName, name: str) -> ModuleType:
    """``minicpm_BACKEND.NAME``. InputError where what the backend needs is not installed."""
    try:
        return importlib.import_module(f"minicpm_{backend}.{name}")
    except ModuleNotFoundError:  # of a part of ours, or of theirs
        raise
    except ImportError as error:  # the package says which extra to install
        raise InputError(str(error)) from None


def get(backend: BackendName) -> Backend:
    """What the command lines ask of a backend."""
    return module(backend, "generate").backend()
