"""Lazy tensors: shape and dtype are known, and the values of a slice are read from the file on demand."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from weights_io.errors import InputError, short
from weights_io.files.regular import open_regular

ROWS = 4096  # rows read at a time to compare two tensors
GAP = 1024  # bytes; rows of a slice with a larger gap between them are read one by one

Index = tuple[slice, ...] | slice | int


class LazyTensor(Protocol):
    """The interface of the tensors that all readers return."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...  # float32, float16, ml_dtypes.bfloat16, ...

    @property
    def source(self) -> Path: ...  # the file that holds it, for messages

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Read the values of ``index``: slices with step 1 for the leading axes; all values by default."""
        ...


def located(name: str, tensor: object) -> str:
    """A tensor's name in messages, with its file if it has one."""
    source = getattr(tensor, "source", None)
    return f"{short(name)} in {source}" if source else short(name)


@dataclass(frozen=True)
class FileTensor:
    """A strided view of an array in a file.

    It is read with ``pread``, not ``mmap``, so that the file's pages do not add to a loader's peak memory.
    """

    source: Path
    offset: int  # bytes from the start of the file to element [0, ..., 0]
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        spans = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=False)]
        spans += [(0, n) for n in self.shape[len(spans) :]]
        shape = tuple(max(0, stop - start) for start, stop in spans)
        if 0 in shape:
            return np.empty(shape, self.dtype)
        first = sum(start * stride for (start, _), stride in zip(spans, self.strides, strict=True))
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, self.strides, strict=True))
        gap = self.strides[-2] - shape[-1] if len(shape) > 1 and self.strides[-1] == 1 else 0
        if gap * self.dtype.itemsize >= GAP:
            return self._rows(first, shape)
        with open_regular(self.source) as file:
            file.seek(self.offset + first * self.dtype.itemsize)
            # fromfile does not know the dtypes of ml_dtypes; bytes do.
            data = np.fromfile(file, np.uint8, extent * self.dtype.itemsize)
        if data.nbytes < extent * self.dtype.itemsize:
            raise self._became_shorter()
        return np.ndarray(shape, self.dtype, data, strides=[s * self.dtype.itemsize for s in self.strides])

    def read_rows(self, start: int, rows: np.ndarray) -> bool:
        """Fill an array with the rows from ``start`` on; False where they do not lie in the file as they do in it."""
        if rows.dtype != self.dtype or not rows.flags.c_contiguous or self.strides != contiguous_strides(self.shape):
            return False
        wanted = rows.reshape(-1).view(np.uint8).data
        with open_regular(self.source, buffering=0) as file:
            file.seek(self.offset + start * rows[0].nbytes)
            while wanted and (count := file.readinto(wanted)):  # type: ignore[attr-defined]
                wanted = wanted[count:]
        if wanted:
            raise self._became_shorter()
        return True

    def _became_shorter(self) -> InputError:
        return InputError(f"{self.source} became shorter while it was read; load it again.")

    def _rows(self, first: int, shape: tuple[int, ...]) -> np.ndarray:
        """The parts of rows of a block that begins at element ``first``, without what lies between them."""
        parts = np.empty(shape, self.dtype)
        with open_regular(self.source) as file:
            for place in np.ndindex(*shape[:-1]):
                element = first + sum(i * stride for i, stride in zip(place, self.strides, strict=False))
                size = shape[-1] * self.dtype.itemsize
                data = os.pread(file.fileno(), size, self.offset + element * self.dtype.itemsize)
                if len(data) < size:
                    raise self._became_shorter()
                parts[place] = np.ndarray(shape[-1:], self.dtype, data)
        return parts


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    strides = []
    step = 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def same_numbers(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors hold the same. Reads both, some rows at a time, unless they are one place in one file."""
    if one == other or one.shape != other.shape:
        return one == other
    if not one.shape:
        return np.array_equal(one.read(), other.read(), equal_nan=True)
    parts = ((slice(i, i + ROWS),) for i in range(0, one.shape[0], ROWS))
    return all(np.array_equal(one.read(part), other.read(part), equal_nan=True) for part in parts)
