"""Fingerprints by which a file that belongs to one model recognizes it, whatever the model's folder is called."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from weights_io.adapters import adapter_folder
from weights_io.checkpoint import Checkpoint

# Part of a fingerprint -> what is said where it differs.
PARTS = {
    "config": "another model (its config.json differs)",
    "weights": "other weights of the same architecture",
    "rope_scaling": "another RoPE scaling",
    "adapter": "another adapter, or without one",
    "quantize": "another --quantize",
}


def fingerprint(
    checkpoint: Checkpoint, adapter: Path | str | None = None, quantize: int | None = None
) -> dict[str, str]:
    """The fingerprint of a model that a command has opened, a short text for each of `PARTS`.

    One row of every tensor is read: a second or less. The same values in another format of file or in a wider dtype
    have the same fingerprint.

    Arguments:
        checkpoint: the open checkpoint; its config has the RoPE scaling of the command.
        adapter: the adapter's folder.
        quantize: bits that the command quantizes the weights to.

    Raises:
        InputError: a file cannot be read.
    """
    numbers = checkpoint.config.to_dict()
    scaling = numbers.pop("rope_scaling", None)
    return {
        "config": _digest(json.dumps(numbers, sort_keys=True, default=str).encode()),
        "weights": _digest(*(_row(checkpoint, name) for name in sorted(checkpoint.tensors))),
        "rope_scaling": _digest(json.dumps(scaling, sort_keys=True, default=lambda found: vars(found)).encode()),
        "adapter": "none" if adapter is None else _digest(*_files(adapter)),
        "quantize": "none" if quantize is None else str(quantize),
    }


def difference(one: Mapping[str, object], other: Mapping[str, object]) -> str | None:
    """What the first differing part of two fingerprints means; None where they are equal."""
    return next((said for part, said in PARTS.items() if one.get(part) != other.get(part)), None)


def _row(checkpoint: Checkpoint, name: str) -> bytes:
    """A row in the middle of a matrix, or a vector, as float32."""
    tensor = checkpoint.tensors[name]
    middle = tensor.shape[0] // 2
    values = tensor.read((slice(middle, middle + 1),)) if len(tensor.shape) > 1 else tensor.read()
    return np.ascontiguousarray(values, np.float32).tobytes()


def _files(adapter: Path | str) -> list[bytes]:
    """The bytes of an adapter's files."""
    path, folder = adapter_folder(adapter)
    if path != folder:
        return [path.read_bytes()]
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
    return [(folder / name).read_bytes() for name in names if (folder / name).is_file()]


def _digest(*parts: bytes) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()
