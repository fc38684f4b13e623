"""The built-in model, which is part of the package."""

from pathlib import Path

from weights_io.errors import InputError

FOLDER = Path(__file__).parent / "pico"


def built_in() -> Path:
    """The folder of the built-in model. Raises `InputError` where the installation lacks it."""
    if not FOLDER.is_dir():
        raise InputError(
            "The built-in model is missing from this installation: reinstall minicpm-jax-mlx or pass a folder."
        )
    return FOLDER
