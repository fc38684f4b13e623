"""Write a checkpoint as a Hugging Face folder, one tensor at a time. The folder appears only when it is complete."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weights_io.casting import Rounding, cast, check_dtype, numpy_dtype
from weights_io.config import DTYPES, ModelConfig, stored_dtype
from weights_io.config_keys import IGNORED_KEYS
from weights_io.errors import InputError, listed
from weights_io.files.folder import SIDE_FILES
from weights_io.files.json_text import MAX_BYTES
from weights_io.files.partial import partial
from weights_io.files.regular import read_regular
from weights_io.files.safetensors import Computed, write_file
from weights_io.files.tensor import LazyTensor, located
from weights_io.parameters import EMBEDDING, HEAD, parameters, tensor_shapes
from weights_io.progress import progress_bar
from weights_io.quantization.writing import Affine
from weights_io.quantization.zero_points import ZeroPoints
from weights_io.vision.names import file_name

Tensor = LazyTensor | Computed

MAX_SHARD_BYTES = 5_000_000_000
# Ignored keys of a source's config.json that its copy leaves out, like all keys that start with "_". They name code
# that is not copied or the source's location, or they are written in the older spelling that every reader knows.
NOT_COPIED_KEYS = frozenset({"auto_map", "model_file", "name_or_path", "rope_parameters", "dtype", "torch_dtype"})


def save_checkpoint(
    out: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    raw_config: Mapping[str, Any] | None = None,
    added_keys: Mapping[str, Any] | None = None,
    copy_from: Path | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    rounding: Rounding | None = None,
    packing: Affine | ZeroPoints | None = None,
) -> list[Path]:
    """Write a model folder. It is written under a temporary name beside ``out`` and renamed when it is complete.

    Arguments:
        out: folder to write; it must not exist yet, or be empty.
        config: the model's.
        tensors: Hugging Face name -> an object with shape, dtype and ``read()``, for every name of the parameter table.
            lm_head.weight is ignored where the head is tied.
        raw_config: the source's config.json; its ignored keys (token ids and the like) are kept.
        added_keys: more keys for config.json.
        copy_from: the source's folder; its tokenizer files and generation_config.json are copied.
        extra_files: file name -> content; these replace copied files.
        dtype: float32, bfloat16 or float16; None keeps each tensor's own.
        max_shard_bytes: the size above which the weights are split into several files.
        rounding: collects the rounding errors of the cast.
        packing: quantize the matrices in this format after the cast.

    Returns:
        The files that were written, weights first.

    Raises:
        InputError: ``out`` cannot be used (see `check_output`), the disk is full, or a value does not fit ``dtype``.
    """
    if dtype is not None:
        check_dtype(dtype)
    out = check_output(out, copy_from)
    tensors = _of_the_table(config, tensors)
    dtypes = {name: numpy_dtype(dtype or tensor.dtype) for name, tensor in tensors.items()}
    parts = {name: _cast_tensor(name, tensor, dtypes[name], rounding) for name, tensor in tensors.items()}
    if packing is not None:
        parts = packing.parts(config, parts)
        added_keys = {**(added_keys or {}), **packing.keys}
    parts = {file_name(name, config): part for name, part in parts.items()}
    sizes = {name: int(np.prod(part.shape)) * part.dtype.itemsize for name, part in parts.items()}
    files = _side_files(config, dtype or _stated_dtype(raw_config, dtypes), raw_config, added_keys, copy_from) | dict(
        extra_files or {}
    )
    shards = _shards(sizes, max_shard_bytes)
    try:
        with folder_to_fill(out.parent), partial(out, folder=True) as unfinished:
            check_space(out, sum(sizes.values()))
            with progress_bar(out.name, sum(sizes.values())) as bar:
                for shard, names in shards.items():
                    write_file(unfinished / shard, {name: _told(parts[name], bar.update) for name in names})
            if len(shards) > 1:
                files["model.safetensors.index.json"] = _index(shards, sizes)
            for name, content in files.items():
                (unfinished / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise unwritable(out, error) from error
    return [out / name for name in (*shards, *sorted(files))]


@contextlib.contextmanager
def folder_to_fill(folder: Path) -> Iterator[None]:
    """Make a folder and its missing parents. Those that are still empty at the end are removed."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in new:
            with contextlib.suppress(OSError):  # not empty, or not made
                each.rmdir()


def check_output(out: Path, source: Path | None = None) -> Path:
    """Check that a new folder can be written at ``out``.

    Returns:
        ``out`` as an absolute path.

    Raises:
        InputError: ``out`` is a file, is not empty, is inside the model folder ``source`` or cannot be accessed.
    """
    try:
        out = Path(out).expanduser().resolve()
        if source is not None and source.is_dir() and out.is_relative_to(source.resolve()):
            raise InputError(
                f"{out} is inside the model folder {source}, which is not changed; choose a folder elsewhere."
            )
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; choose a folder that does not exist yet.")
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out} exists and is not empty; choose another folder or remove it first.")
    except (OSError, RuntimeError) as error:  # a loop of links, a folder without permission, no home for ~
        raise InputError(f"cannot use {out} as an output folder ({error}); choose another.") from error
    return out


def unstack_params(config: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Computed]:
    """Split the JAX model's arrays into Hugging Face tensors.

    Arguments:
        config: the model's.
        arrays: `Parameter.name` -> array of `Parameter.shape`; anything that ``np.asarray`` takes, e.g. ``jax.Array``.

    Returns:
        Hugging Face name -> tensor. Each is fetched from the device when it is written.
    """
    tensors = {}
    for parameter in parameters(config):
        array = arrays[parameter.name]
        places = np.ndindex(*parameter.stack(config))  # without stacked axes: (), once
        for place, tensor in zip(places, parameter.hf_names(config), strict=True):

            def make(array: Any = array, place: tuple[int, ...] = place) -> np.ndarray:
                return np.asarray(array[place] if place else array)

            tensors[tensor] = Computed(parameter.tensor_shape(config), np.dtype(array.dtype), make)
    return tensors


def of_layers(config: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Computed]:
    """Split the MLX model's arrays (`Parameter.mlx_names`), stacked over experts only, into Hugging Face tensors."""
    tensors: dict[str, Computed] = {}
    for parameter in parameters(config):
        for name, experts in parameter.mlx_names(config).items():
            parts = arrays[name] if parameter.per_expert else [arrays[name]]
            tensors |= {tensor: Computed.of(part) for tensor, part in zip(experts, parts, strict=True)}
    return tensors


def _of_the_table(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    expected = dict(tensor_shapes(config))
    wrong = [name for name, shape in expected.items() if name not in tensors or tuple(tensors[name].shape) != shape]
    wrong += [name for name in tensors if name not in expected and name != HEAD.hf_name]
    if wrong:
        raise ValueError(f"tensors missing, misshapen or not of the model: {listed(wrong)}")
    return {name: tensors[name] for name in expected}


def _cast_tensor(name: str, tensor: Tensor, dtype: np.dtype, rounding: Rounding | None) -> Computed:
    def make() -> np.ndarray:
        return cast(located(name, tensor), tensor.read(), dtype, rounding=rounding)

    return Computed(tuple(tensor.shape), dtype, make)


def _told(tensor: Computed, written: Callable[[int], Any]) -> Computed:
    """A tensor that reports its bytes when it is computed."""

    def make() -> np.ndarray:
        array = tensor.make()
        written(array.nbytes)
        return array

    return dataclasses.replace(tensor, make=make)


def _shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> tensor names. No file is above ``limit`` bytes unless a single tensor is."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def _index(shards: Mapping[str, list[str]], sizes: Mapping[str, int]) -> str:
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    return _json({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _side_files(
    config: ModelConfig,
    dtype: str,
    raw_config: Mapping[str, Any] | None,
    added_keys: Mapping[str, Any] | None,
    copy_from: Path | None,
) -> dict[str, str | bytes]:
    copied = {key for key in IGNORED_KEYS - NOT_COPIED_KEYS if not key.startswith("_")}
    copied |= {"sparse_config"} if config.family.scaled else set()  # what the original's code reads
    kept = {key: value for key, value in (raw_config or {}).items() if key in copied}
    files: dict[str, str | bytes] = {
        "config.json": _json(kept | config.to_dict() | {"torch_dtype": dtype} | dict(added_keys or {}))
    }
    for path in [copy_from / name for name in SIDE_FILES] if copy_from is not None else []:
        if os.path.lexists(path):
            files[path.name] = read_regular(path, MAX_BYTES)
    return files


def _stated_dtype(raw_config: Mapping[str, Any] | None, dtypes: Mapping[str, np.dtype]) -> str:
    """The dtype for config.json where none was asked for: the source's, else the embedding's."""
    embedding = dtypes[EMBEDDING.hf_name].name
    return stored_dtype(dict(raw_config or {})) or (embedding if embedding in DTYPES else "float32")


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def check_space(out: Path, needed: int) -> None:
    """Raises `InputError` where the disk of ``out`` has fewer free bytes than ``needed``."""
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise InputError(
            f"{out} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; free some space or choose "
            "another disk."
        )


def unwritable(out: Path, error: OSError) -> InputError:
    """The error of writing ``out``, as a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"the disk of {out} is full (nothing was written); free some space or choose another disk.")
    where = f" ({error.filename})" if error.filename else ""
    return InputError(f"cannot write {out}: {error.strerror or error}{where}; choose another folder.")
