"""The built-in models, which are part of the package."""

from pathlib import Path

from weights_io.errors import InputError

ROOT = Path(__file__).parent


def built_in(name: str = "pico") -> Path:
    """The folder of a built-in model. Raises `InputError` where the installation lacks it.

    Arguments:
        name: ``pico``, or ``pico-tools``, which was taught to call tools.
    """
    folder = ROOT / name.replace("-", "_")
    if not folder.is_dir():
        raise InputError(
            f"The built-in model {name} is missing from this installation: reinstall minicpm-jax-mlx or pass a folder."
        )
    return folder
