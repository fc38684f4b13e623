"""Shared code of the notebooks for Macs: checks of the runtime."""

import importlib.metadata
import platform
from collections.abc import Iterator

from minicpm_data.cli import notebook as shared
from minicpm_data.cli.notebook import accept_cpu
from minicpm_data.cli.notebook import fresh as fresh  # for the notebooks
from minicpm_data.cli.notebook import of_a_clone as of_a_clone
from minicpm_data.cli.notebook import resume as resume
from minicpm_data.cli.notebook import run as run
from minicpm_data.cli.notebook import run_folder as run_folder
from minicpm_data.cli.notebook import take_token as take_token
from weights_io.memory import size


def check_runtime() -> None:
    """Print the device that MLX runs on. Raises `InputError` if that is a CPU that was not requested."""
    for line in runtime():
        print(line)


def runtime() -> Iterator[str]:
    """Versions, the device and its memory."""
    import mlx.core as mx

    from minicpm_mlx import device

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm"))
    yield f"{versions}, {platform.platform()}"
    yield device.description()
    if mx.default_device() == mx.cpu:
        yield accept_cpu("a Mac with Apple silicon", "run it there, in a native (arm64) Python")
    else:
        yield f"{size(int(mx.device_info()['max_recommended_working_set_size']))} of memory for the GPU"


def check_room(model: str, *copies: str | None) -> None:
    """`minicpm_data.cli.notebook.check_room` for this device."""
    from minicpm_mlx import device

    shared.check_room(model, copies, memory=device.free_memory(), device="Mac")
