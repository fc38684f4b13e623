"""Read all weights of a checkpoint in several threads.

`read_stacked` is for a backend that computes on numpy's memory; `check_all_finite` is for a backend that maps the files
and only needs the check. A tensor is read in pieces. Each piece is checked and cast while it is in the processor's
cache, and is written to its final place. Several threads are needed because a single one waits for new memory pages.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from weights_io.casting import numpy_dtype
from weights_io.checkpoint import Checkpoint
from weights_io.parameters import parameters

ALIGNMENT = 64  # bytes; XLA copies an array that is not aligned to it
PIECE = 1 << 20  # values
THREADS = 4  # more threads do not copy faster, and each holds a piece


def read_stacked(checkpoint: Checkpoint, dtype: str, matrices: str | None = None) -> dict[str, np.ndarray]:
    """Read all weights as the JAX model stacks them. Peak memory is the arrays plus one piece per thread.

    Arguments:
        checkpoint: the open checkpoint.
        dtype: dtype of the arrays.
        matrices: dtype of the matrices, if another.

    Returns:
        `Parameter.name` -> array of `Parameter.shape`, aligned to `ALIGNMENT`.

    Raises:
        InputError: as `Checkpoint.read`.
    """
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


def check_all_finite(checkpoint: Checkpoint, names: Iterable[str], dtype: str) -> None:
    """Read tensors only to check them. Raises `InputError` as `Checkpoint.read` does."""

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
        for _ in pool.map(read, names):  # raises the first error, and cancels the rest
            pass


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array whose address is a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
