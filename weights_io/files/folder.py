"""Open the weights of a model folder in any of the usual file layouts."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from weights_io.errors import InputError, listed, short
from weights_io.files import safetensors, torch_pickle
from weights_io.files.json_text import read_json
from weights_io.files.regular import open_regular
from weights_io.files.tensor import LazyTensor, same_numbers

# In order of preference.
USUAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
KINDS = "model.safetensors, pytorch_model.bin and an index of either"  # for messages
# The files of a model besides config.json and the weights. They are downloaded from a hub, and copied by an export.
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
MAX_SHARDS = 10_000


def open_folder(folder: Path) -> dict[str, LazyTensor]:
    """The lazy tensors of a model folder, by name.

    The first existing file is used of model.safetensors, model.safetensors.index.json, pytorch_model.bin and
    pytorch_model.bin.index.json; else the only ``*.safetensors`` file that is neither an adapter nor a shard. If two
    shards hold the same tensor, both copies are read and compared.

    Raises:
        InputError: there are no weights, shards are missing, shards and index contradict each other, or a folder has
            both a single file and shards.
    """
    for name in USUAL:
        if os.path.lexists(folder / name):
            if name.endswith(".json"):
                return _open_index(folder / name)
            _check_alone(folder / name)
            return _open_weights(folder / name)
    others = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter"))
    if len(others) == 1 and (not _is_shard(others[0].name) or others[0].stem.endswith("-of-00001")):
        return _open_weights(others[0])
    if others:
        raise InputError(
            f"{folder} has {listed(p.name for p in others)}, but no {USUAL[1]} that says what is in them; "
            "download the index too."
        )
    raise InputError(f"{folder} is not a model folder: it has none of {KINDS}.")


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of the shards. Raises `InputError` for a damaged index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{path} holds no weight_map of tensor names to file names; download it again.")
    shards = set(weight_map.values())
    if len(shards) > MAX_SHARDS:
        raise InputError(f"{path} names {len(shards)} files, more than any model has; download it again.")
    suffix = Path(path.name.removesuffix(".index.json")).suffix
    for shard in shards:
        # Only a plain file name is accepted, so that an index cannot name files outside its folder (links are allowed).
        if re.search(r"[/\\:\0]", shard) or shard.startswith(".") or not shard.endswith(suffix):
            raise InputError(
                f"{path} names {short(shard)!r}, which is not a {suffix} file beside it; download it again."
            )
    return weight_map


def _is_shard(name: str) -> bool:
    return re.search(r"-\d+-of-\d+\.", name) is not None


def _check_alone(path: Path) -> None:
    """Refuse a single file beside shards. transformers prefers the single file and keeps it when it writes shards, so
    the two may be different models. Raises `InputError`."""
    index = path.with_name(f"{path.name}.index.json")
    names = {other.name for other in path.parent.glob(f"{path.stem}-*{path.suffix}") if _is_shard(other.name)}
    if os.path.lexists(index):
        names |= {name for name in read_weight_map(index).values() if os.path.lexists(path.with_name(name))}
    if shards := sorted(names - {path.name}):
        raise InputError(
            f"{path.parent} holds {path.name} and the shards {listed(shards)}, which may be another model; remove what "
            "is not meant."
        )


def _open_weights(path: Path) -> dict[str, LazyTensor]:
    reader: Callable[[Path], dict] = torch_pickle.open_file if path.suffix == ".bin" else safetensors.open_file
    with open_regular(path) as file:
        pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    if pointer:
        raise InputError(f"{path} is a Git LFS pointer, not the weights; fetch them with git lfs pull.")
    return reader(path)


def _open_index(path: Path) -> dict[str, LazyTensor]:
    """All tensors of the shards: first those that the index lists, then the others, as for a single file."""
    weight_map = read_weight_map(path)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not os.path.lexists(path.parent / shard)]
    if missing:
        raise InputError(f"{path.parent} lacks {listed(missing)}, which {path.name} names; download them too.")
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        found = _open_weights(path.parent / shard)
        if lacking := sorted(name for name, where in weight_map.items() if where == shard and name not in found):
            raise InputError(
                f"{path.parent / shard} lacks {listed(lacking)}, unlike {path.name} says; download both again."
            )
        for name in found.keys() & tensors.keys():
            _check_twice(name, tensors[name], found[name])
            if weight_map.get(name) != shard:
                del found[name]
        tensors |= found
    return {name: tensors[name] for name in [*weight_map, *(tensors.keys() - weight_map.keys())]}


def _check_twice(name: str, one: LazyTensor, other: LazyTensor) -> None:
    if one.dtype != other.dtype or not same_numbers(one, other):
        raise InputError(
            f"{short(name)} is another one in {one.source} than in {other.source}; download both files again."
        )
