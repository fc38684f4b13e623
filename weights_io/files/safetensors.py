"""Safetensors files, read lazily and written one tensor at a time.

The header is read here and not by the ``safetensors`` package (which is the oracle of the tests): that package maps the
file into memory, so that a loader's peak counts the file twice, and hands out its own slices; here all formats hand out
one class, `FileTensor`, that reads with ``pread``. The format (github.com/huggingface/safetensors, README): 8 bytes
little-endian header length N, N bytes of JSON ``{name: {dtype, shape, data_offsets}}``, then the data without gaps.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from weights_io.errors import InputError, short
from weights_io.files.json_text import MAX_CONFIG, parse_object
from weights_io.files.regular import open_regular
from weights_io.files.tensor import FileTensor, LazyTensor, contiguous_strides

MAX_HEADER = MAX_CONFIG  # a model of 100 000 tensors has 15 MB
MAX_DIMS = 64  # numpy's own limit
LIMIT = 2**63  # numpy's sizes are signed 64 bit

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Computed:
    """A tensor that is computed when it is written. ``make`` returns an array of ``shape`` and ``dtype``."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "Computed":
        """Wrap an existing array."""
        return cls(array.shape, array.dtype, lambda: array)

    def read(self) -> np.ndarray:
        return self.make()


def open_file(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file by name, none of them read yet.

    Raises:
        InputError: the file is missing, truncated, longer than its header says, or its header contradicts itself.
    """
    return open_with_metadata(path)[0]


def open_with_metadata(path: Path) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """`open_file`, and the metadata of the file."""
    header, metadata, start, size = _read_header(path)
    tensors = {}
    spans = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        spans.append((begin, end, name))
        tensors[name] = FileTensor(path, start + begin, dtype, shape, contiguous_strides(shape))
    _check_spans(path, sorted(spans), start, size)
    return tensors, metadata


def write_file(
    path: Path, tensors: Mapping[str, LazyTensor | Computed], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, with one tensor in memory at a time.

    The widest dtypes come first, so that each tensor is aligned to its item size; within a dtype the order is that of
    ``tensors``.

    Arguments:
        path: the file to write.
        tensors: name -> an object with shape, dtype and ``read()``.
        metadata: of the header; default: ``format: pt``, without which transformers refuses a file of weights.

    Raises:
        ValueError: safetensors does not have a dtype, or an array differs from its declared shape or dtype. The file is
            then incomplete; write to a temporary name and rename.
    """
    names = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    position = 0
    for name in names:
        dtype, shape = np.dtype(tensors[name].dtype), tuple(tensors[name].shape)
        if dtype not in NAMES or name in header:
            raise ValueError(f"safetensors cannot hold a tensor named {name} of dtype {dtype}")
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = tensors[name].read()
            if array.shape != tuple(tensors[name].shape) or array.dtype != tensors[name].dtype:
                raise ValueError(
                    f"{name} was declared {tensors[name].dtype} {tuple(tensors[name].shape)} "
                    f"and is {array.dtype} {array.shape}"
                )
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _read_header(path: Path) -> tuple[dict, dict[str, str], int, int]:
    """Header without its metadata, the metadata, where the data start, and the file's size (bytes)."""
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        if size < 8:
            raise InputError(f"{path} has {size} bytes and is no safetensors file; download it again.")
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER):
            raise InputError(
                f"{path} promises a header of {length} bytes, but has {size} bytes in all (and a header may have "
                f"{MAX_HEADER}): it is truncated or no safetensors file; download it again."
            )
        data = file.read(length)
    header = parse_object(data, f"the header of {path}", MAX_HEADER)
    metadata = header.pop("__metadata__", {})
    metadata = {} if metadata is None else metadata  # MLX writes null where there are none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"__metadata__ in the header of {path} does not map strings to strings; download it again.")
    return header, metadata, 8 + length, size


def _entry(path: Path, name: str, entry: object) -> tuple[np.dtype, tuple[int, ...], int, int]:
    fields = {"dtype", "shape", "data_offsets"}

    def fault(text: str) -> InputError:
        return InputError(f"{short(name)} in {path} {text}; download it again.")

    if not isinstance(entry, dict) or entry.keys() != fields or not isinstance(entry["dtype"], str):
        raise fault("is not described by dtype, shape and data_offsets")
    if entry["dtype"] not in DTYPES:
        raise fault(f"has the dtype {short(entry['dtype'])}, which is none of safetensors' that are read here")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise fault("has a shape with negative, fractional or too many sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise fault("has data_offsets that are not two whole numbers")
    dtype = DTYPES[entry["dtype"]]
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize or math.prod(max(n, 1) for n in shape) >= LIMIT:
        raise fault(
            f"is {entry['dtype']} {short(shape)}, but has data_offsets {offsets}, which is another number of bytes"
        )
    return dtype, tuple(shape), begin, end


def _naturals(value: object) -> bool:
    """Whether this is a list of sizes; a JSON true is an int to isinstance."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < LIMIT for n in value)


def _check_spans(path: Path, spans: list[tuple[int, int, str]], start: int, size: int) -> None:
    """The tensors, in order of their place, must follow each other without gap or overlap up to the end of the file."""
    expected = start + max((end for _, end, _ in spans), default=0)
    if expected != size:
        state = "truncated" if size < expected else "too long"
        raise InputError(
            f"{path} is {state}: its header describes {expected} bytes and it has {size}; download it again."
        )
    position = 0
    for begin, end, name in spans:
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves unused bytes before it"
            raise InputError(
                f"{short(name)} in {path} starts at byte {begin}, not {position}, and {fault}; download it again."
            )
        position = end
