"""All weights of a checkpoint read by several threads: for a backend that computes on arrays which lie where numpy has
put them, and for one that maps files and has only to know that their numbers are some.

Every number is written where it stays. A tensor is read in pieces that are looked through for NaN and cast while they
are in a processor's cache, several tensors at a time: one thread alone waits for the pages of new memory.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from weights_io.casting import numpy_dtype
from weights_io.checkpoint import Checkpoint
from weights_io.parameters import parameters

ALIGNMENT = 64  # bytes; of an array that begins elsewhere XLA makes a copy
PIECE = 1 << 20  # numbers
THREADS = 4  # at most: more do not copy faster, and each holds a piece


def read_stacked(checkpoint: Checkpoint, dtype: str, matrices: str | None = None) -> dict[str, np.ndarray]:
    """Arrays in ``dtype`` by their names in the parameter table, each of a `Parameter.shape`, all aligned; ``matrices``
    may be in another. Raises `InputError` as `Checkpoint.read` does. Peak memory is the arrays and a piece for each
    thread."""
    arrays: dict[str, np.ndarray] = {}
    places: dict[str, np.ndarray] = {}
    for parameter in parameters(checkpoint.config):
        shape, stored = parameter.shape(checkpoint.config), parameter.tensor_shape(checkpoint.config)
        own = matrices if matrices is not None and len(stored) > 1 else dtype
        arrays[parameter.name] = array = aligned(shape, numpy_dtype(own))
        rows = array.reshape(-1, *stored)
        places |= zip(parameter.hf_names(checkpoint.config), rows, strict=True)

    def read(name: str) -> None:
        for part in _pieces(checkpoint, name):
            checkpoint.read_rows(name, part.start, places[name][part])

    _in_threads(read, places)
    return arrays


def look_through(checkpoint: Checkpoint, names: Iterable[str], dtype: str) -> None:
    """Read tensors as `read_stacked` does, for nothing but its errors."""

    def read(name: str) -> None:
        for part in _pieces(checkpoint, name):
            checkpoint.read(name, dtype, (part,))

    _in_threads(read, names)


def _pieces(checkpoint: Checkpoint, name: str) -> Iterator[slice]:
    length, *row = checkpoint.tensors[name].shape
    rows = max(1, PIECE // math.prod(row))
    for start in range(0, length, rows):
        yield slice(start, start + rows)


def _in_threads(read: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(read, names):  # raises what the first one raised, and drops the others
            pass


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins at a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
