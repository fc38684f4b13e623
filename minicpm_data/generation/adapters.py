"""Several LoRA adapters of one model, whose requests share a batch.

Dims: A adapters, R the largest rank, O out, I in; stacked parameters have leading axes (L layers).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from weights_io.adapters import CONFIG, Adapter, read_adapter, stack_adapter, target_parameters
from weights_io.config import ModelConfig
from weights_io.errors import InputError, short

AdapterArrays = dict[str, tuple[np.ndarray, np.ndarray]]  # parameter name -> a [L, A + 1, R, I], b [L, A + 1, O, R]


def adapter_folders(folder: Path | str) -> list[Path]:
    """The adapters of a folder, each a folder in it, sorted by name; hidden ones are left out. Nothing is read.

    Raises:
        InputError: there is no such folder, it is itself an adapter, or it holds none.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one that holds a folder for each adapter.", option="adapters")
    if (folder / CONFIG).is_file():
        raise InputError(f"{folder} is itself an adapter; give the folder that holds it.", option="adapters")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise InputError(f"{folder} holds no adapters; give a folder that holds one for each.", option="adapters")
    return found


def read_adapters(folder: Path | str, config: ModelConfig) -> tuple[tuple[str, ...], AdapterArrays]:
    """The names of the adapters of a folder, and their arrays.

    Raises:
        InputError: as `adapter_folders` and `weights_io.adapters.read_adapter`, or an adapter cannot share a batch.
    """
    paths = adapter_folders(folder)
    adapters = [read_adapter(path, config) for path in paths]
    for path, adapter in zip(paths, adapters, strict=True):
        _check(path, adapter, config)
    return tuple(path.name for path in paths), stacked(adapters, config)


def _check(path: Path, adapter: Adapter, config: ModelConfig) -> None:
    remedy = "fuse it with the weights, or give it alone with {adapter_path}"
    if adapter.config.dora:
        raise InputError(f"holds {short(path.name)}, which is DoRA: {remedy}.", "adapters", ["adapter_path"])
    for parameter in target_parameters(config, adapter.config.targets):
        if parameter.per_expert or (config.is_latent and parameter.name.endswith(".kv_b_proj.weight")):
            what = "experts" if parameter.per_expert else "kv_b_proj"
            raise InputError(
                f"holds {short(path.name)}, which adapts {what}, and rows of a batch cannot differ there: {remedy}.",
                "adapters",
                ["adapter_path"],
            )


def stacked(adapters: Sequence[Adapter], config: ModelConfig) -> AdapterArrays:
    """The matrices of all adapters, padded with zeros to the largest rank. The scale is in b. Index 0 is no adapter."""
    rank = max(adapter.config.rank for adapter in adapters)
    arrays: AdapterArrays = {}
    for index, adapter in enumerate(adapters, 1):
        own = adapter.config.rank
        for parameter in target_parameters(config, adapter.config.targets):
            a, b, _ = stack_adapter(parameter, adapter, config)
            if parameter.name not in arrays:
                *stack, out, width = parameter.shape(config)
                several = (*stack, len(adapters) + 1)
                arrays[parameter.name] = (
                    np.zeros((*several, rank, width), np.float32),
                    np.zeros((*several, out, rank), np.float32),
                )
            into_a, into_b = arrays[parameter.name]
            into_a[..., index, :own, :], into_b[..., index, :, :own] = a, b * np.float32(adapter.config.scale)
    return arrays
