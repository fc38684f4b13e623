"""Read and write adapters in the formats of Hugging Face PEFT and mlx_lm, and convert between the two.

    python -m weights_io.adapters --model minicpm-2b --adapter-path adapters --to peft --save-path peft-adapter

`weights_io.lora` holds the arrays and the arithmetic; its public names are re-exported here.
"""

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from weights_io import mlx_lm_format, peft_format
from weights_io.command_line import Former
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.json_text import read_json
from weights_io.files.partial import partial, write_whole
from weights_io.files.safetensors import write_file
from weights_io.files.tensor import LazyTensor
from weights_io.lora import (
    Adapter,
    AdapterConfig,
    LoRAMatrices,
    adapter_by_layer,
    adapter_from_layers,
    fuse_adapter,
    row_norms,
    stack_adapter,
    unstack_adapter,
)
from weights_io.parameters import target_parameters

__all__ = [
    "Adapter",
    "AdapterConfig",
    "LoRAMatrices",
    "adapter_by_layer",
    "adapter_from_layers",
    "fuse_adapter",
    "read_adapter",
    "row_norms",
    "save_adapter",
    "stack_adapter",
    "target_parameters",
    "unstack_adapter",
]
Form = Literal["peft", "mlx_lm"]
FORMS: dict[str, Any] = {"peft": peft_format, "mlx_lm": mlx_lm_format}
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Options:
    to: Form
    """Format. peft: adapter_model.safetensors for PEFT; mlx_lm: adapters.safetensors for mlx_lm."""
    save_path: Annotated[Path, Former("out")]
    """Folder to write."""
    model: str | None = None
    """Model of the adapter: folder, GGUF file, hub id or short name (default: the built-in model)."""
    adapter_path: Path = Path("adapters")
    """Folder of the adapter, in either format."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where --model's config is downloaded from if it is not on this disk."""


def main(options: Options) -> None:
    """Convert an adapter to the format of PEFT or of mlx_lm. Only the config of its model is needed."""
    from weights_io.checkpoint import open_model
    from weights_io.write import check_output

    check_output(options.save_path)
    config = open_model(options.model, options.revision, options.hub, weights=False).config
    adapter = read_adapter(options.adapter_path, config)
    written = save_adapter(options.save_path, adapter, config, form=options.to, base_model=options.model)
    print(f"{options.save_path}: {summary(adapter)}")
    print("\n".join(f"  {file.name:34} {file.stat().st_size:>14,} bytes" for file in written))


def summary(adapter: Adapter) -> str:
    """One line for the user: kind, rank, scale, number of matrices and targets."""
    config = adapter.config
    return (
        f"{'DoRA' if config.dora else 'LoRA'} of rank {config.rank}, scale {config.scale:g}, on "
        f"{len(adapter.tensors)} matrices ({', '.join(config.targets)})"
    )


def read_adapter(path: Path | str, config: ModelConfig) -> Adapter:
    """Read an adapter written by PEFT or mlx_lm.

    Arguments:
        path: the adapter's folder, or its weights file with ``adapter_config.json`` beside it.
        config: the config of its model.

    Returns:
        The adapter, with all tensors read as float32.

    Raises:
        InputError: there is no adapter, a file is damaged, a setting is not supported, a number is NaN or infinite,
            or a tensor does not fit the model (the first one is named with both shapes).
    """
    form, raw, weights = find_adapter(path)
    return form.read(raw, _open(weights), config, str(weights.parent))


def find_adapter(path: Path | str) -> tuple[Any, dict[str, Any], Path]:
    """Look for an adapter, as `read_adapter` does, and read only its config.

    Returns:
        The module of its format, its config, and the file of its weights.

    Raises:
        InputError: there is no adapter.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file() or not path.exists():
        raise InputError(
            f"{path} is no adapter: give the folder that holds {CONFIG} and adapter_model.safetensors (of PEFT) or "
            "adapters.safetensors (of mlx_lm)."
        )
    raw = read_json(folder / CONFIG)
    form = next((form for form in FORMS.values() if form.is_config(raw)), None)
    if form is None:
        raise InputError(
            f"{folder / CONFIG} has neither peft_type nor lora_parameters; take an adapter of PEFT or mlx_lm."
        )
    candidates = [folder / name for name in form.WEIGHTS] if path == folder else [path]
    weights = next((file for file in candidates if file.is_file()), None)
    if weights is None:
        raise InputError(f"{folder} has no {form.WEIGHTS[0]}, which belongs to its {CONFIG}; save the adapter again.")
    return form, raw, weights


def save_adapter(
    folder: Path | str, adapter: Adapter, config: ModelConfig, *, form: Form = "peft", base_model: str | None = None
) -> list[Path]:
    """Write an adapter in float32. Each file replaces the old one only when it is complete.

    Arguments:
        folder: the folder to write; it is made if it is missing.
        adapter: the adapter.
        config: the config of its model.
        form: ``peft`` or ``mlx_lm``.
        base_model: the model that PEFT loads when it opens the adapter alone; default: the adapter's own note.

    Returns:
        The two files, weights first.

    Raises:
        InputError: the folder cannot be written, or holds an adapter of the other format.
    """
    folder = Path(folder).expanduser()
    raw, tensors = FORMS[form].files(adapter, config, base_model or adapter.config.base_model)
    text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
    others = [name for other, module in FORMS.items() if other != form for name in module.WEIGHTS]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any((folder / name).exists() for name in others):
            raise InputError(f"{folder} holds an adapter of another format; choose another folder.")
        written = [folder / FORMS[form].WEIGHTS[0], folder / CONFIG]
        with partial(written[0]) as path:
            write_file(path, tensors)
        write_whole(written[1], text)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"the disk of {folder} is full (no file was changed); free some space.") from error
        raise InputError(f"cannot write {folder} ({error.strerror or error}); choose another folder.") from error
    return written


def _open(path: Path) -> Mapping[str, LazyTensor]:
    from weights_io.files import safetensors, torch_pickle

    if path.suffix not in (".safetensors", ".bin"):
        raise InputError(f"{path} is neither a .safetensors nor a .bin file; save the adapter as one of these.")
    return (torch_pickle if path.suffix == ".bin" else safetensors).open_file(path)


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m weights_io.adapters")
