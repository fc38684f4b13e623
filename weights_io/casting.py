"""Numbers scaled and rounded to another dtype, with what that cost them."""

from dataclasses import dataclass

import numpy as np

from weights_io.errors import InputError

BLOCK = 1 << 20  # elements worked on at a time, so that a 1 GB embedding needs no second copy in float32


@dataclass
class Rounding:
    """Relative rounding errors |rounded - exact| / |exact|, summed up over all that `cast` was given with it."""

    worst: float = 0.0
    total: float = 0.0
    count: int = 0  # numbers rounded, zeros included
    vanished: int = 0  # numbers that became 0

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    def add(self, exact: np.ndarray, rounded: np.ndarray) -> None:
        """Both of one shape, in the dtype of ``exact``."""
        error = np.zeros_like(exact)
        magnitude = np.abs(exact)
        np.divide(np.abs(rounded - exact), magnitude, out=error, where=(magnitude > 0) & np.isfinite(magnitude))
        self.worst = max(self.worst, float(error.max(initial=0.0)))
        self.total += float(error.sum(dtype=np.float64))
        self.count += exact.size
        self.vanished += int(np.count_nonzero((rounded == 0) & (magnitude > 0)))


def cast(
    name: str,
    array: np.ndarray,
    dtype: np.dtype | str,
    multiply: float = 1.0,
    divide: float = 1.0,
    rounding: Rounding | None = None,
) -> np.ndarray:
    """``array * multiply / divide`` in ``dtype``, worked out in float32 (in float64 where that is to be float32).

    Raises:
        InputError: a finite number of the tensor ``name`` is not finite in ``dtype``.
    """
    dtype = numpy_dtype(dtype)
    scaled = multiply != 1 or divide != 1
    if array.dtype == dtype and not scaled:
        return array
    working = np.promote_types(array.dtype, np.float64 if scaled and dtype.itemsize >= 4 else np.float32)
    result = np.empty(array.shape, dtype)
    source, target = array.reshape(-1), result.reshape(-1)
    for start in range(0, source.size, BLOCK):
        block = source[start : start + BLOCK]
        with np.errstate(all="ignore"):  # overflow is found below
            exact = block.astype(working)
            if multiply != 1:
                exact *= working.type(multiply)
            if divide != 1:
                exact /= working.type(divide)
            rounded = exact.astype(dtype)
        finite = np.isfinite(rounded)
        if not finite.all() and not np.array_equal(finite, np.isfinite(block)):
            raise InputError(f"{name} has numbers too large for {dtype}; choose a dtype of wider range.")
        target[start : start + BLOCK] = rounded
        if rounding is not None and (scaled or dtype.itemsize < array.dtype.itemsize or _trade(array.dtype, dtype)):
            rounding.add(exact, rounded.astype(working))
    return result


def numpy_dtype(dtype: np.dtype | str) -> np.dtype:
    """A numpy dtype, also from "bfloat16", which numpy itself does not know."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


def _trade(source: np.dtype, target: np.dtype) -> bool:
    """Whether neither holds the other: bfloat16 and float16."""
    return source != target and source.itemsize == target.itemsize
