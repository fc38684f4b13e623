"""Where the model lies that comes with the package."""

from importlib.util import find_spec
from pathlib import Path

from weights_io.errors import InputError


def built_in() -> Path:
    """The folder of the model that comes with this package."""
    spec = find_spec("minicpm_data")  # finds the package without importing it
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (folder := Path(location) / "pico").is_dir():
            return folder
    raise InputError(
        "The built-in model is missing from this installation: reinstall minicpm-jax-mlx or pass a folder."
    )
