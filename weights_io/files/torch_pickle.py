"""``pytorch_model.bin`` (the zip archive of ``torch.save``) without torch, and without running what the file asks for.

The archive holds ``NAME/data.pkl``, a pickle of the state dict whose tensors point to storages, and each storage
uncompressed as ``NAME/data/KEY``. A pickle is a program: it may call any function it can name. Here it can name the few
below, which only note down what they were called with; every other name is refused. Tensors are then strided views of
the storages in the file (`FileTensor`), so shared storages, offsets and transposed strides cost nothing.
Source of the format: torch/serialization.py and torch/_utils.py.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from weights_io.errors import InputError
from weights_io.files.tensor import FileTensor

MAX_PICKLE = 20_000_000  # bytes; that of a model of 10 000 tensors has 2 million
MAX_NESTED = (
    100_000  # tuples and calls, of which a tensor has 6; a million, one in the other, overflow Python's C stack
)
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


# What the pickle may build. Named tuples, since its BUILD opcode sets attributes, and these have none that can be set.
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


class _Dict(dict):
    """Stands for OrderedDict; drops the ``_metadata`` that ``state_dict()`` hangs on it."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


def open_file(path: Path) -> dict[str, FileTensor]:
    """The tensors of a torch file by name, none of them read yet.

    Accepted are a state dict and a dict that holds one under ``state_dict`` or ``model``.

    Raises:
        InputError: the file is missing, truncated, older than torch 1.6, big-endian, compressed or a TorchScript
            archive; its pickle names anything but tensors; a tensor lies outside its storage.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            _check_magic(path, file.read(4))
            pickled, places = _read_archive(path, file, size)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    state = _state_dict(path, _unpickle(path, pickled))
    return {name: _view(path, name, tensor, places) for name, tensor in state.items()}


def _check_magic(path: Path, magic: bytes) -> None:
    if magic[:1] == b"\x80":
        raise InputError(
            f"{path} has the format of torch before 1.6, which is not read here; load it with torch and save it again, "
            "or convert it to safetensors."
        )
    if magic != b"PK\x03\x04":
        raise InputError(f"{path} is no torch file (a torch file is a zip archive); download it again.")


def _read_archive(path: Path, file: io.BufferedReader, size: int) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The pickle, and for each storage key the byte offset in the file and the length of its data."""
    try:
        archive = zipfile.ZipFile(file)
        names = [info.filename for info in archive.infolist()]
        roots = [name.removesuffix("data.pkl") for name in names if name.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise InputError(f"{path} is a zip archive but not one of torch.save (no NAME/data.pkl); convert it.")
        root = roots[0]
        if root + "constants.pkl" in names or any(name.startswith(root + "code/") for name in names):
            raise InputError(f"{path} is a TorchScript archive, i.e. a program; save the model's state_dict instead.")
        entries = {}
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
                raise InputError(
                    f"{info.filename} in {path} is compressed or encrypted; save it again with torch.save."
                )
            entries[info.filename] = (_data_offset(file, info), info.file_size)
            if sum(entries[info.filename]) > size:
                raise InputError(f"{info.filename} in {path} goes beyond the end of the file; download it again.")
        if entries[root + "data.pkl"][1] > MAX_PICKLE:
            raise InputError(f"{path} has a pickle of more than {MAX_PICKLE} bytes, more than any model needs.")
        if root + "byteorder" in names and _stored(file, *entries[root + "byteorder"]) != b"little":
            raise InputError(f"{path} is not little-endian; save it again on a little-endian machine.")
        pickled = _stored(file, *entries[root + "data.pkl"])
    except InputError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error) as error:
        raise InputError(f"{path} is truncated or damaged ({error}); download it again.") from error
    prefix = root + "data/"
    return pickled, {name.removeprefix(prefix): place for name, place in entries.items() if name.startswith(prefix)}


def _stored(file: io.BufferedReader, offset: int, size: int) -> bytes:
    """An entry's bytes. Not by `ZipFile.read`, which checks the CRC: torch does not, and can be told to write none."""
    file.seek(offset)
    return file.read(size)


def _data_offset(file: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes start: behind its local header, whose name and extra field have their own lengths."""
    file.seek(info.header_offset)
    signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no local header for {info.filename}")
    return info.header_offset + 30 + name + extra


def _unpickle(path: Path, pickled: bytes) -> Any:
    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            return _known_global(path, module, name)

        def persistent_load(self, pid: object) -> _Storage:
            match pid:
                case ("storage", _Dtype(dtype), str(key), _, int(count)) if 0 <= count < LIMIT:
                    return _Storage(key, dtype, count)
            raise InputError(f"{path} refers to something that is no tensor storage; save its state_dict again.")

    try:
        nested = sum(op.name.startswith(("TUPLE", "REDUCE")) for op, _, _ in pickletools.genops(pickled))
        if nested > MAX_NESTED:
            raise InputError(f"{path} has a pickle of {nested} parts, more than any model needs.")
        return Unpickler(io.BytesIO(pickled), encoding="utf-8").load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle may raise any exception, says the documentation of pickle
        raise InputError(f"the pickle in {path} is damaged ({error}); download the file again.") from error


def _known_global(path: Path, module: str, name: str) -> object:
    """What stands for ``module.name``. Callables are made anew: a pickle can set attributes on what it gets."""
    match module, name:
        case "collections", "OrderedDict":
            return lambda *items: _Dict(*items)
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
        f"{path} would run {module}.{name}, which is not needed to hold tensors, and was not run; "
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
            raise InputError(f"{name} in {path} is not a tensor; save the plain state_dict again.")
    return loaded


def _view(path: Path, name: str, tensor: _Tensor, places: dict[str, tuple[int, int]]) -> FileTensor:
    """The tensor as a strided view of the file, after checking that it lies inside its storage."""

    def fault(text: str) -> InputError:
        return InputError(f"{name} in {path} {text}; download the file again.")

    storage, offset, shape, strides, dtype = tensor
    if not isinstance(storage, _Storage) or storage.key not in places:
        raise fault("has no storage in the file")
    dtype = storage.dtype if dtype is None else dtype
    if dtype is None:
        raise fault("has a storage without a dtype")
    if not (_naturals((offset,)) and _naturals(shape) and _naturals(strides)) or len(shape) != len(strides):
        raise fault("has an offset, shape or strides that are not whole numbers from 0 on")
    if len(shape) > MAX_DIMS:
        raise fault(f"has {len(shape)} dimensions, more than numpy's {MAX_DIMS}")
    start, held = places[storage.key]
    if storage.elements * (1 if storage.dtype is None else storage.dtype.itemsize) != held:
        raise fault(f"expects a storage of {storage.elements} elements and finds {held} bytes")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    extent = 0 if 0 in shape else (last + 1) * dtype.itemsize
    if extent > held or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= LIMIT:
        raise fault(f"of shape {list(shape)} goes beyond its storage of {held} bytes")
    strides = tuple(step if n > 1 else 0 for n, step in zip(shape, strides, strict=True))  # those of 1 may be anything
    return FileTensor(path, start + offset * dtype.itemsize, dtype, shape, strides)


def _naturals(value: object) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and 0 <= n < LIMIT for n in value)
