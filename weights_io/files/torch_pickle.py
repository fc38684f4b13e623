"""Read ``pytorch_model.bin`` (the zip archive of ``torch.save``) without torch and without executing the pickle.

The archive (`torch_archive`) holds the storages, and a pickle of the state dict whose tensors refer to them. A pickle
is a program that may call any function by name. `pickle_program` interprets it and allows only the few names below,
which record their arguments; any other name is refused. A tensor becomes a strided view of its storage in the file
(`FileTensor`), so shared storages, offsets and transposed strides cost nothing. Source of the format:
torch/serialization.py and torch/_utils.py.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from weights_io.errors import InputError, short
from weights_io.files.pickle_program import OrderedState, Program
from weights_io.files.tensor import FileTensor
from weights_io.files.torch_archive import Stored, StoredTensor, read_archive

MAX_REPEATED = 2**24  # bytes that a tensor may have beyond its storage, by repeating values (stride 0)
MAX_DIMS = 64  # numpy's own limit
LIMIT = 2**63  # numpy's sizes are signed 64 bit

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
DTYPES = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16", "bool")},
    **{f"{kind}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (64, 32, 16, 8)},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


# The objects that a pickle may create.
class _Dtype(NamedTuple):
    """A storage class or a dtype; None where only the tensor knows (`torch.UntypedStorage`, counted in bytes)."""

    dtype: np.dtype | None


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype | None
    elements: int


class _Tensor(NamedTuple):
    """What the pickle says of a tensor; of what type the parts are is known only when `_view` has looked."""

    storage: Any
    offset: Any  # in elements, as the strides
    shape: Any
    strides: Any
    dtype: np.dtype | None


def open_file(path: Path) -> dict[str, FileTensor]:
    """The tensors of a torch file by name, none of them read yet.

    Accepted are a state dict and a dict that holds one under ``state_dict`` or ``model``.

    Raises:
        InputError: the file is missing, truncated, older than torch 1.6, big-endian, compressed or a TorchScript
            archive; its pickle names anything but tensors; a tensor lies outside its storage.
    """
    pickled, storages = read_archive(path)
    state = _state_dict(path, _unpickle(path, pickled))
    return {name: _view(path, name, tensor, storages) for name, tensor in state.items()}


def _unpickle(path: Path, pickled: bytes) -> Any:
    def storage(pid: object) -> _Storage:
        match pid:
            case ("storage", _Dtype(dtype), str(key), _, int(count)) if 0 <= count < LIMIT:
                return _Storage(key, dtype, count)
        raise InputError(f"{path} refers to something that is no tensor storage; save its state_dict again.")

    try:
        return Program(lambda module, name: _known_global(path, module, name), storage).run(pickled)
    except InputError:
        raise
    except Exception as error:  # pickletools raises several
        raise InputError(f"the pickle in {path} is damaged ({error}); download the file again.") from error


def _known_global(path: Path, module: str, name: str) -> object:
    """What stands for ``module.name``."""
    match module, name:
        case "collections", "OrderedDict":
            return OrderedState
        case "torch._utils", "_rebuild_tensor_v2":
            return lambda storage, offset, shape, strides, grad, hooks, metadata=None: _rebuild(
                path, storage, offset, shape, strides, None, metadata
            )
        case "torch._utils", "_rebuild_tensor_v3":
            return lambda storage, offset, shape, strides, grad, hooks, dtype, metadata=None: _rebuild(
                path, storage, offset, shape, strides, dtype, metadata
            )
        case "torch._utils", "_rebuild_parameter":
            return lambda tensor, grad, hooks: tensor
        case "torch" | "torch.storage", "UntypedStorage":
            return _Dtype(None)
        case "torch", _ if name in STORAGES:
            return _Dtype(STORAGES[name])
        case "torch", _ if name in DTYPES:
            return _Dtype(DTYPES[name])
    raise InputError(
        f"{path} would run {short(module)}.{short(name)}, which is not needed to hold tensors, and was not run; "
        "use safetensors weights, or save the plain state_dict again."
    )


def _rebuild(
    path: Path, storage: object, offset: object, shape: object, strides: object, dtype: object, metadata: object
) -> _Tensor:
    if metadata:
        raise InputError(f"{path} holds tensors with conjugate or negative bits; resolve them before saving.")
    return _Tensor(storage, offset, shape, strides, dtype.dtype if isinstance(dtype, _Dtype) else None)


def _state_dict(path: Path, loaded: Any) -> dict[str, _Tensor]:
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds a {type(loaded).__name__.strip('_')}, not a state_dict; save the state_dict.")
    for key in ("state_dict", "model"):
        if isinstance(loaded.get(key), dict) and not any(isinstance(value, _Tensor) for value in loaded.values()):
            loaded = loaded[key]
            break
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise InputError(
                f"{path} has a key that is a {type(name).__name__}, not a name; save the state_dict again."
            )
        if not isinstance(value, _Tensor):
            raise InputError(f"{short(name)} in {path} is not a tensor; save the plain state_dict again.")
    return loaded


def _view(path: Path, name: str, tensor: _Tensor, storages: dict[str, Stored]) -> FileTensor:
    """The tensor as a strided view of the file, after checking that it lies inside its storage."""

    def fault(text: str) -> InputError:
        return InputError(f"{short(name)} in {path} {text}; download the file again.")

    storage, offset, shape, strides, dtype = tensor
    if not isinstance(storage, _Storage) or storage.key not in storages:
        raise fault("has no storage in the file")
    dtype = storage.dtype if dtype is None else dtype
    if dtype is None:
        raise fault("has a storage without a dtype")
    if not (_naturals((offset,)) and _naturals(shape) and _naturals(strides)) or len(shape) != len(strides):
        raise fault("has an offset, shape or strides that are not whole numbers from 0 on")
    if len(shape) > MAX_DIMS:
        raise fault(f"has {len(shape)} dimensions, more than numpy's {MAX_DIMS}")
    stored = storages[storage.key]
    held = stored.size
    if storage.elements * (1 if storage.dtype is None else storage.dtype.itemsize) != held:
        raise fault(f"expects a storage of {storage.elements} elements and finds {held} bytes")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    extent = 0 if 0 in shape else (last + 1) * dtype.itemsize
    if extent > held or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= LIMIT:
        raise fault(f"of shape {list(shape)} goes beyond its storage of {held} bytes")
    if math.prod(shape) * dtype.itemsize > held + MAX_REPEATED:
        raise fault(f"of shape {list(shape)} repeats the numbers of a storage of {held} bytes")
    strides = tuple(step if n > 1 else 0 for n, step in zip(shape, strides, strict=True))  # those of 1 may be anything
    return StoredTensor(path, stored.offset + offset * dtype.itemsize, dtype, shape, strides, stored)


def _naturals(value: object) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and 0 <= n < LIMIT for n in value)
