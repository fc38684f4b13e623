"""The neutral form of a quantized matrix, the tensor that a file packs it in, and codes as a stream of bits.

    w[o, i] = table[codes[o, i]] * scales[o, g] * factor                (bitsandbytes; int8: no table)
    w[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g]                (GPTQ, AWQ)
    w[o, i] = codes[o, i] * scales[o, g] + biases[o, g]                 (MLX affine)

with g = i // group_size, or groups[i] where the file says (GPTQ's act-order). Worked out in float32, as the tools do.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weights_io.files.tensor import LazyTensor

CHUNK = 1 << 22  # numbers that are made from codes at a time, whatever part of a matrix is read


@dataclass(frozen=True)
class Packed:
    """Some rows of a matrix [out, in] (or all) as the file has them, one code in each byte."""

    codes: np.ndarray  # [out, in] uint8; int8 where bitsandbytes' int8 has signs
    scales: np.ndarray  # [out, G] float32, float16 or bfloat16
    bits: int  # of a code
    group_size: int  # neighbors in a row with one scale; G = in / group_size
    zeros: np.ndarray | None = None  # [out, G] int32: the code that stands for 0
    biases: np.ndarray | None = None  # [out, G], of the dtype of the scales
    table: np.ndarray | None = None  # [2**bits] float32: what a code stands for
    groups: np.ndarray | None = None  # [in] int32, the group of each input; None: i // group_size
    factor: float = 1.0  # on each product, after it is rounded to float32

    @property
    def order(self) -> np.ndarray | None:
        """The inputs sorted by group (act-order); None where they are in order. ``codes[:, order]`` has the groups one
        after the other, and multiplies ``x[..., order]``."""
        if self.groups is None or bool((np.diff(self.groups) >= 0).all()):
            return None
        return np.argsort(self.groups, kind="stable")

    def dequantize(self) -> np.ndarray:
        """[out, in] float32."""
        values = self.codes.astype(np.float32) if self.table is None else self.table[self.codes]
        if self.groups is None:
            values = values.reshape(*self.scales.shape, self.group_size)

        def each(of_groups: np.ndarray) -> np.ndarray:
            of_groups = of_groups.astype(np.float32)
            return of_groups[..., None] if self.groups is None else of_groups[:, self.groups]

        if self.zeros is not None:
            values -= each(self.zeros)
        values *= each(self.scales)
        if self.biases is not None:
            values += each(self.biases)
        if self.factor != 1.0:
            values *= np.float32(self.factor)
        return values.reshape(self.codes.shape)


@dataclass(frozen=True)
class PackedTensor:
    """A matrix that a file holds in a packed form. It reads as float32, some rows at a time; `packed` gives the codes.

    One class for each format has the parts of the file as fields.
    """

    shape: tuple[int, int]  # of the matrix: [out, in]
    source: Path
    bits: int
    group_size: int

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def kind(self) -> str:
        """As a report calls it: ``GPTQ 4-bit in groups of 32``."""
        raise NotImplementedError

    @property
    def grouping(self) -> str:
        return "in whole rows" if self.group_size == self.shape[1] else f"in groups of {self.group_size}"

    @property
    def arithmetic(self) -> str | None:
        """The dtype that the tool computes in, where the file says: of its scales."""
        raise NotImplementedError

    def packed(self, start: int = 0, stop: int | None = None) -> Packed:
        """The rows from ``start`` to ``stop``. Raises `InputError` where the file contradicts its format."""
        raise NotImplementedError

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """As `LazyTensor.read`; peak memory is the result and a chunk. Whole rows are read, whatever the columns."""
        spans = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=False)]
        (start, stop), (left, right) = spans + [(0, n) for n in self.shape[len(spans) :]]
        result = np.empty((max(0, stop - start), max(0, right - left)), self.dtype)
        rows = max(1, CHUNK // self.shape[1] // 32) * 32  # in some formats 32 rows share words
        for first in range(start, stop if result.size else start, rows):
            last = min(first + rows, stop)
            result[first - start : last - start] = self.packed(first, last).dequantize()[:, left:right]
        return result


def arithmetic_dtype(tensor: object) -> str:
    """The dtype to compute in with this tensor: its own, or of a packed one that of its scales."""
    return getattr(tensor, "arithmetic", None) or tensor.dtype.name  # type: ignore[attr-defined]


def unpack(data: np.ndarray, bits: int) -> np.ndarray:
    """Codes [..., n] (uint8) of a stream of bits [..., n * bits / 8] (uint8), the lowest bit first; n: of 8."""
    lead, mask = data.shape[:-1], (1 << bits) - 1
    if 8 % bits == 0:
        codes = np.empty((*data.shape, 8 // bits), np.uint8)
        for k in range(8 // bits):
            np.right_shift(data, k * bits, out=codes[..., k])
        codes &= np.uint8(mask)
    else:  # 8 codes in so many bytes
        parts = data.reshape(*lead, -1, bits)
        words = np.zeros(parts.shape[:-1], np.uint64)
        for k in range(bits):
            words |= parts[..., k].astype(np.uint64) << np.uint64(8 * k)
        codes = np.empty((*words.shape, 8), np.uint8)
        for k in range(8):
            codes[..., k] = (words >> np.uint64(k * bits)) & np.uint64(mask)
    return codes.reshape(*lead, data.shape[-1] * 8 // bits)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `unpack`."""
    parts = codes.reshape(*codes.shape[:-1], -1, 8)
    words = np.zeros(parts.shape[:-1], np.uint64)
    for k in range(8):
        words |= parts[..., k].astype(np.uint64) << np.uint64(k * bits)
    data = np.ascontiguousarray(words.astype("<u8")).view(np.uint8).reshape(*words.shape, 8)[..., :bits]
    return np.ascontiguousarray(data).reshape(*codes.shape[:-1], codes.shape[-1] * bits // 8)


def words_of_columns(tensor: LazyTensor, bits: int, start: int, stop: int) -> np.ndarray:
    """Codes [rows, stop - start] of 32-bit words [rows, columns * bits / 32] that hold the codes of a row in a stream;
    only the words that have them are read."""
    first = start // 32 * 32  # where a word begins, whatever the bits
    last = min(-(-stop // 32) * 32, tensor.shape[1] * 32 // bits)
    words = np.ascontiguousarray(tensor.read((slice(None), slice(first * bits // 32, last * bits // 32))))
    return unpack(words.view(np.uint8), bits)[:, start - first : stop - first]
