"""Scale arrays, cast them to another dtype and record the rounding errors."""

from dataclasses import dataclass

import numpy as np

from weights_io.config import DTYPES
from weights_io.errors import InputError, short

BLOCK = 1 << 20  # elements cast at a time, so that a 1 GB embedding needs no second copy in float32
GROUPS = (64, 32)  # quantization group sizes; the first that divides a row is used
CACHED = 1 << 16  # elements compared at a time; they fit the processor's cache


@dataclass
class Rounding:
    """Relative rounding errors |rounded - exact| / |exact|, accumulated over the calls of `cast`."""

    worst: float = 0.0
    total: float = 0.0
    count: int = 0  # values rounded, zeros included
    vanished: int = 0  # values that became 0

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    def add(self, exact: np.ndarray, rounded: np.ndarray) -> None:
        """Add the errors of an array. Both arguments have the same shape and dtype."""
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
    """Compute ``array * multiply / divide`` and cast it to ``dtype``.

    The product is computed in float32, or in float64 where ``dtype`` is float32.

    Arguments:
        name: the tensor's name in messages.
        array: floats of any dtype.
        dtype: the dtype of the result.
        multiply, divide: the scale.
        rounding: collects the rounding errors.

    Returns:
        The result; ``array`` itself where nothing changes.

    Raises:
        InputError: a value is NaN or infinite, or would be infinite in ``dtype``.
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
        with np.errstate(all="ignore"):  # overflow is checked below
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
    """The largest |x|. Raises `InputError`, with ``what`` as its subject, where an x is NaN or infinite."""
    largest = largest_magnitude(values)
    if not np.isfinite(largest):
        raise InputError(
            f"{what} holds NaN or infinite numbers, and would make every logit NaN; download the file again or use "
            "another checkpoint."
        )
    return largest


def largest_magnitude(values: np.ndarray) -> np.ndarray:
    """The largest |x| of a float array, 0 if it is empty; NaN or infinite where an x is.

    The bits of floats without the sign are ordered like the floats. Comparing them as integers takes 6 GB/s; numpy
    compares bfloat16 and float16 values one by one.
    """
    bits = values.reshape(-1).view(f"u{values.dtype.itemsize}")
    no_sign = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    largest = bits.dtype.type(0)
    for start in range(0, bits.size, CACHED):
        largest = max(largest, (bits[start : start + CACHED] & no_sign).max())
    return largest[None].view(values.dtype)[0]


def check_dtype(dtype: object) -> str:
    """Return ``dtype`` if weights can be loaded and written in it. Raises `InputError` otherwise."""
    if not isinstance(dtype, str):
        name = getattr(dtype, "__name__", str(dtype)).rpartition(".")[2]
        raise InputError(f"is {short(name)} of a library; give its name as a text, such as 'bfloat16'.", option="dtype")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; choose {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    return dtype


def check_bits(bits: int) -> int:
    """Return ``bits`` if weights can be quantized to it. Raises `InputError` otherwise."""
    if bits not in (4, 8):
        raise InputError(f"quantize is {bits!r}; it must be 4 or 8.")
    return bits


def check_head_bits(bits: int | None) -> int | None:
    """Return ``bits`` if the head can be quantized to it, or None. Raises `InputError` otherwise."""
    if bits not in (None, 8):
        raise InputError(f"head_bits is {bits!r}; it must be 8.")
    return bits


def group_of(width: int) -> int:
    """The quantization group size for rows of ``width`` values; the smallest of `GROUPS` where none divides it."""
    return next((group for group in GROUPS if width % group == 0), GROUPS[-1])


def check_groups(name: str, width: int) -> None:
    """Raises `InputError` where no group size divides rows of ``width`` values."""
    if width % group_of(width):
        raise InputError(f"the rows of {name} ({width}) are not a multiple of {GROUPS[-1]}; leave out --quantize.")


def numpy_dtype(dtype: np.dtype | str) -> np.dtype:
    """The numpy dtype of a name, including "bfloat16", which numpy does not know."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


def _trade(source: np.dtype, target: np.dtype) -> bool:
    """Whether neither dtype contains the other: bfloat16 and float16."""
    return source != target and source.itemsize == target.itemsize
