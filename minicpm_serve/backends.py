"""The two backends by name, each imported when it is asked for."""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from minicpm_data.generation.api import Backend
from minicpm_data.model_options import ModelOptions
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
    return module(backend, "backend").backend()


@dataclass(frozen=True, kw_only=True)
class BackendOptions(ModelOptions):
    backend: BackendName
    """What runs the model."""
    mesh: str | None = None
    """How the devices are arranged (JAX), such as data=2,tensor=4; by default heads along tensor as far as each device
    then holds less of the cache."""

    def check_placement(self) -> None:
        if self.backend == "mlx" and self.mesh is not None:
            raise InputError("arranges the devices of JAX; leave it out with {backend} mlx.", "mesh", ["backend"])

    def placement(self) -> dict[str, Any]:
        """That of ``minicpm_jax.chat``."""
        self.check_placement()
        if self.backend == "mlx":
            return {}
        return module("jax", "chat").Options(mesh=self.mesh).placement()
