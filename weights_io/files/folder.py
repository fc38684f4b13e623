"""The weights of a model folder, whichever of the usual files hold them."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from weights_io.errors import InputError
from weights_io.files import safetensors, torch_pickle
from weights_io.files.tensor import LazyTensor

# The best first.
USUAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# What belongs to a model beside config.json and its weights: fetched from a hub, and copied by an export.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
LFS_POINTER = b"version https://git-lfs"


def open_folder(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a model folder by name, none of them read yet.

    Taken is the first that exists of model.safetensors, model.safetensors.index.json, pytorch_model.bin and
    pytorch_model.bin.index.json, else the only ``*.safetensors`` file that is neither an adapter nor a shard.

    Raises:
        InputError: there are no weights, shards are missing, or shards and index contradict each other.
    """
    for name in USUAL:
        if (folder / name).exists():
            return _open_index(folder / name) if name.endswith(".json") else _open_weights(folder / name)
    others = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter"))
    if len(others) == 1 and not re.search(r"-\d+-of-\d+\.", others[0].name):
        return _open_weights(others[0])
    if others:
        raise InputError(
            f"{folder} has {', '.join(p.name for p in others)}, but no {USUAL[1]} that says what is in them; "
            "download the index too."
        )
    raise InputError(f"{folder} is not a model folder: it has none of {', '.join(USUAL)}.")


def _open_weights(path: Path) -> dict[str, LazyTensor]:
    reader: Callable[[Path], dict] = torch_pickle.open_file if path.suffix == ".bin" else safetensors.open_file
    try:
        with open(path, "rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from error
    if pointer:
        raise InputError(f"{path} is a Git LFS pointer, not the weights; fetch them with git lfs pull.")
    return reader(path)


def _open_index(path: Path) -> dict[str, LazyTensor]:
    weight_map = _weight_map(path)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not os.path.exists(path.parent / shard)]
    if missing:
        raise InputError(f"{path.parent} lacks {', '.join(missing)}, which {path.name} names; download them too.")
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        found = _open_weights(path.parent / shard)
        promised = {name for name, where in weight_map.items() if where == shard}
        faults = [f"lacks {name}" for name in sorted(promised - found.keys())]
        faults += [f"has {name} besides" for name in sorted(found.keys() - promised)]
        if faults:
            raise InputError(
                f"{path.parent / shard} {', '.join(faults)}, unlike {path.name} says; download both again."
            )
        tensors |= found
    return {name: tensors[name] for name in weight_map}


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name beside the index."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from error
    weight_map = safetensors.parse_object(data, str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{path} has no weight_map of tensor names to file names; download it again.")
    suffix = Path(path.name.removesuffix(".index.json")).suffix
    for shard in set(weight_map.values()):
        # A file name and nothing else, so that no index reads files outside its folder (links are the user's own).
        if re.search(r"[/\\:\0]", shard) or shard.startswith(".") or not shard.endswith(suffix):
            raise InputError(f"{path} names {shard!r}, which is not a {suffix} file beside it; download it again.")
    return weight_map
