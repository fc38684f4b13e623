"""Adapters in and out, as folders of Hugging Face's PEFT and of mlx_lm.

    from weights_io.adapters import read_adapter, save_adapter

What an adapter does to the weights is in `weights_io.lora`, whose names are here too.
"""

from pathlib import Path
from typing import Literal

from weights_io.config import ModelConfig
from weights_io.lora import (
    Adapter,
    AdapterConfig,
    Matrices,
    by_layer,
    from_layers,
    fused,
    row_norms,
    stacked,
    target_parameters,
    unstacked,
)

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Matrices",
    "by_layer",
    "from_layers",
    "fused",
    "read_adapter",
    "row_norms",
    "save_adapter",
    "stacked",
    "target_parameters",
    "unstacked",
]
Form = Literal["peft", "mlx_lm"]


def read_adapter(path: Path, config: ModelConfig) -> Adapter:
    """The adapter in the folder ``path`` (or with that safetensors file, its adapter_config.json beside it), as PEFT or
    mlx_lm write it, for a model of this config; all of its tensors are read, as float32.

    Raises:
        InputError: there is none, it is damaged, changes the model in a way that is not supported, holds NaN or
            infinities, or is of another model: the first tensor that does not fit is named with both shapes.
    """
    raise NotImplementedError


def save_adapter(
    folder: Path, adapter: Adapter, config: ModelConfig, *, form: Form = "peft", base_model: str | None = None
) -> list[Path]:
    """Write an adapter of a model of this config, in float32, and return its two files, weights first.

    ``base_model`` (default: the adapter's own note) is what PEFT looks for when it opens the adapter alone. Each file
    takes its name when it is whole: killed, or out of disk, the export leaves the adapter that was there before.

    Raises:
        InputError: the folder cannot be written or holds an adapter of the other form.
    """
    raise NotImplementedError
