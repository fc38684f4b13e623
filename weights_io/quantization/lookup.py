"""A quantized matrix as bytes and a table of their values, for what MLX's affine form cannot hold.

    w[o, i] = (table[byte][place] - zeros[o, g]) * scales[o, g]

These are bitsandbytes' 4-bit codes, whose values are in a table, and groups that are not a multiple of 32. A byte holds
1, 2 or 4 codes, the first one in the lowest bits. Codes of 3 bits are stored in 4, those of 5 and 6 bits in 8.
"""

from collections.abc import Sequence

import numpy as np

from weights_io.casting import numpy_dtype
from weights_io.quantization.packed import Packed


def stored_bits(bits: int, inputs: int) -> int:
    """Bits in which a code of ``bits`` bits is stored: the fewest of 2, 4 and 8 whose bytes no two rows share."""
    return next(each for each in (2, 4, 8) if each >= bits and inputs * each % 8 == 0)


def values_of_bytes(table: Sequence[float], bits: int) -> np.ndarray:
    """The values of the codes of each byte, [256, 8 / bits] float32. ``table``: the value of each code."""
    whole = np.zeros(1 << bits, np.float32)
    whole[: len(table)] = table
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return whole[np.arange(256, dtype=np.uint8)[:, None] >> shifts & np.uint8((1 << bits) - 1)]


def lookup(packed: Packed, bits: int, dtype: str) -> dict[str, np.ndarray]:
    """The arrays of the form.

    Arguments:
        packed: a quantized matrix without biases, whose inputs are sorted by `Packed.order`.
        bits: `stored_bits`.
        dtype: of the scales.

    Returns:
        ``weight`` uint8 [out, in * bits / 8], ``scales`` [out, G] and, if it has zero points, ``zeros`` uint8 [out, G].
    """
    codes = packed.codes.view(np.uint8)
    if packed.order is not None:
        codes = codes[:, packed.order]
    each = codes.reshape(len(codes), -1, 8 // bits)
    data = np.zeros(each.shape[:-1], np.uint8)
    for place in range(8 // bits):
        data |= each[..., place] << np.uint8(place * bits)
    with np.errstate(over="ignore"):  # the caller checks the result
        scales = (packed.scales.astype(np.float32) * np.float32(packed.factor)).astype(numpy_dtype(dtype))
    arrays = {"weight": data, "scales": scales}
    if packed.zeros is not None:
        arrays["zeros"] = packed.zeros.astype(np.uint8)
    return arrays
