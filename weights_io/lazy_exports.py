"""Public names of a package that cost nothing until they are used."""

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any


def install(package: str, exports: dict[str, str]) -> Callable[[str], Any]:
    """Make ``package.name`` import ``package.module`` on first use, for each ``name: module`` of ``exports``.

    Returns the function to assign to the package's ``__getattr__``. A type checker sees none of this: the package
    imports the same names under ``if TYPE_CHECKING``.

    An exported function may share its name with the module that holds it (``minicpm_jax.generate`` is the function,
    ``python -m minicpm_jax.generate`` the command). Importing that module would rebind the package's attribute to the
    module, so the package refuses to have an exported name rebound to a module. What else is in that module is had by
    ``from minicpm_jax.generate import Options``, as in mlx_lm, where ``mlx_lm.generate`` is the function too.
    """

    module = sys.modules[package]

    class LazyPackage(types.ModuleType):
        def __setattr__(self, name: str, value) -> None:
            if not (name in exports and isinstance(value, types.ModuleType)):
                super().__setattr__(name, value)

        def __dir__(self):
            return sorted({*self.__dict__, *exports})

    def load(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{exports[name]}"), name)
        setattr(module, name, value)
        return value

    module.__class__ = LazyPackage
    module.__dict__["__all__"] = sorted(exports)
    return load
