"""The backends by name. Each is imported on its first use."""

import importlib
import platform
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

from minicpm_data.generation.api import Backend
from minicpm_data.model_options import ModelOptions
from weights_io.errors import InputError

BackendName = Literal["jax", "mlx"]
NEEDED: dict[BackendName, tuple[str, ...]] = {"jax": ("jax", "flax"), "mlx": ("mlx",)}
TITLES: dict[BackendName, str] = {"jax": "JAX", "mlx": "MLX"}


def default() -> BackendName:
    """The backend that is installed. Of both: MLX on Apple silicon, and JAX elsewhere. Without any the same one, whose
    import names the extra to install."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    order: tuple[BackendName, ...] = ("mlx", "jax") if apple else ("jax", "mlx")
    installed = (name for name in order if all(find_spec(package) is not None for package in NEEDED[name]))
    return next(installed, order[0])


def require(backend: BackendName) -> None:
    """Raises `InputError` if the backend's packages are not installed. They are not imported."""
    _imported(f"minicpm_{backend}")


def module(backend: BackendName, name: str) -> ModuleType:
    """The module ``minicpm_BACKEND.NAME``. Raises `InputError` if the backend's packages are not installed."""
    return _imported(f"minicpm_{backend}.{name}")


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:  # a defect of the installation
        raise
    except ImportError as error:  # the package says which extra to install
        raise InputError(str(error)) from None


def get(backend: BackendName) -> Backend:
    """The backend's interface for command lines."""
    return module(backend, "backend").backend()


@dataclass(frozen=True, kw_only=True)
class BackendOptions(ModelOptions):
    backend: BackendName = field(default_factory=default)
    """Backend that runs the model. It may be left out: the one that is installed is taken; if both are, mlx on Apple
    silicon and jax elsewhere."""
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
