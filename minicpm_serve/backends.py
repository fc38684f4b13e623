"""The backends by name. Each is imported on its first use."""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from minicpm_data.generation.api import Backend
from minicpm_data.model_options import ModelOptions
from weights_io.errors import InputError

BackendName = Literal["jax", "mlx"]


def module(backend: BackendName, name: str) -> ModuleType:
    """The module ``minicpm_BACKEND.NAME``. Raises `InputError` if the backend's packages are not installed."""
    try:
        return importlib.import_module(f"minicpm_{backend}.{name}")
    except ModuleNotFoundError:  # a defect of the installation
        raise
    except ImportError as error:  # the package says which extra to install
        raise InputError(str(error)) from None


def get(backend: BackendName) -> Backend:
    """The backend's interface for command lines."""
    return module(backend, "backend").backend()


@dataclass(frozen=True, kw_only=True)
class BackendOptions(ModelOptions):
    backend: BackendName
    """Backend that runs the model."""
    mesh: str | None = None
    """Axes and sizes of the device mesh (JAX), such as data=2,tensor=4. By default heads are sharded over tensor as
    long as that makes each device's cache smaller."""

    def check_placement(self) -> None:
        if self.backend == "mlx" and self.mesh is not None:
            raise InputError("arranges the devices of JAX; leave it out with {backend} mlx.", "mesh", ["backend"])

    def placement(self) -> dict[str, Any]:
        """The placement of ``minicpm_jax.chat``."""
        self.check_placement()
        if self.backend == "mlx":
            return {}
        return module("jax", "chat").Options(mesh=self.mesh).placement()
