"""Numbers scaled and rounded to another dtype, with what that cost them."""

from dataclasses import dataclass

import numpy as np

from weights_io.config import DTYPES
from weights_io.errors import InputError

BLOCK = 1 << 20  # elements worked on at a time, so that a 1 GB embedding needs no second copy in float32
GROUPS = (64, 32)  # numbers of a row in few bits that share a scale: the first that divides the row
CACHED = 1 << 16  # elements looked at together: their bits stay in the processor's cache


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
        InputError: a number of the tensor ``name`` is NaN or infinite, or would be infinite in ``dtype``.
    """
    dtype = numpy_dtype(dtype)
    check_finite(name, array)
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
        if not np.isfinite(rounded).all():
            raise InputError(f"{name} has numbers too large for {dtype}; choose a dtype of wider range.")
        target[start : start + BLOCK] = rounded
        if rounding is not None and (scaled or dtype.itemsize < array.dtype.itemsize or _trade(array.dtype, dtype)):
            rounding.add(exact, rounded.astype(working))
    return result


def check_finite(what: str, values: np.ndarray) -> np.ndarray:
    """The largest |x|. Raises `InputError`, naming ``what``, where any x is NaN or infinite."""
    largest = largest_magnitude(values)
    if not np.isfinite(largest):
        raise InputError(
            f"{what} holds NaN or infinite numbers, and would make every logit NaN; download the file again or take "
            "another checkpoint."
        )
    return largest


def largest_magnitude(values: np.ndarray) -> np.ndarray:
    """The largest |x| of a float array (0 where it is empty); NaN or infinite where any x is.

    Without the sign, floats are ordered as their bits are: whole numbers are compared, at 6 GB/s, where numpy would
    look at bfloat16 and float16 one by one.
    """
    bits = values.reshape(-1).view(f"u{values.dtype.itemsize}")
    no_sign = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    largest = bits.dtype.type(0)
    for start in range(0, bits.size, CACHED):
        largest = max(largest, (bits[start : start + CACHED] & no_sign).max())
    return largest[None].view(values.dtype)[0]


def check_dtype(dtype: str) -> str:
    """``dtype``, the name of one that weights are loaded and written in. Raises `InputError` for any other."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; choose {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    return dtype


def check_bits(bits: int) -> int:
    """``bits`` that weights can be kept in. Raises `InputError` for any other number."""
    if bits not in (4, 8):
        raise InputError(f"quantize is {bits}; it must be 4 or 8.")
    return bits


def group_of(width: int) -> int:
    """The one of `GROUPS` for rows of so many numbers; the last where none divides them."""
    return next((group for group in GROUPS if width % group == 0), GROUPS[-1])


def check_groups(name: str, width: int) -> None:
    """Raises `InputError` where rows of so many numbers have no groups."""
    if width % group_of(width):
        raise InputError(f"rows of {width} in {name} have no groups of {GROUPS[-1]}; leave out --quantize.")


def numpy_dtype(dtype: np.dtype | str) -> np.dtype:
    """A numpy dtype, also from "bfloat16", which numpy itself does not know."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


def _trade(source: np.dtype, target: np.dtype) -> bool:
    """Whether neither holds the other: bfloat16 and float16."""
    return source != target and source.itemsize == target.itemsize
