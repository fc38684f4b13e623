"""The common form of a quantized matrix, its lazy tensor, and packing of codes into a bit stream.

    w[o, i] = table[codes[o, i]] * scales[o, g] * factor                (bitsandbytes; int8 has no table)
    w[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g]                (GPTQ, AWQ)
    w[o, i] = codes[o, i] * scales[o, g] + biases[o, g]                 (MLX affine)

Here g = i // group_size, or groups[i] where the file stores the groups (GPTQ's act-order). The values are computed in
float32, as the tools do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from weights_io.files.tensor import LazyTensor

CHUNK = 1 << 22  # values dequantized at a time


@dataclass(frozen=True)
class Packed:
    """Rows of a quantized matrix [out, in], with one code per byte."""

    codes: np.ndarray  # [out, in] uint8; int8 where they are signed (bitsandbytes' int8, GGUF's blocks without minima)
    scales: np.ndarray  # [out, G] float32, float16 or bfloat16
    bits: int  # bits per code
    group_size: int  # consecutive values of a row with one scale; G = in / group_size
    zeros: np.ndarray | None = None  # [out, G] int32: the zero points
    biases: np.ndarray | None = None  # [out, G], in the dtype of the scales
    table: np.ndarray | None = None  # [2**bits] float32: the value of each code
    groups: np.ndarray | None = None  # [in] int32, the group of each input; None: i // group_size
    factor: float = 1.0  # multiplies each product after its rounding to float32

    @property
    def order(self) -> np.ndarray | None:
        """The permutation that sorts the inputs by group (act-order); None where they are sorted.

        ``codes[:, order]`` has contiguous groups, and multiplies ``x[..., order]``.
        """
        if self.groups is None or bool((np.diff(self.groups) >= 0).all()):
            return None
        return np.argsort(self.groups, kind="stable")

    def dequantize(self) -> np.ndarray:
        """The values, [out, in] float32."""
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
    """A quantized matrix in a file. `read` dequantizes it to float32; `packed` returns the codes.

    Each format has a subclass with the parts of the file as fields.
    """

    shape: tuple[int, int]  # of the dequantized matrix: [out, in]
    source: Path
    bits: int
    group_size: int

    parts: ClassVar[tuple[str, ...]] = ()  # the arrays of `Packed` beside codes and scales: zeros or biases

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def kind(self) -> str:
        """The format for a report: ``GPTQ 4-bit in groups of 32``."""
        raise NotImplementedError

    @property
    def grouping(self) -> str:
        return "in whole rows" if self.group_size == self.shape[1] else f"in groups of {self.group_size}"

    @property
    def arithmetic(self) -> str | None:
        """The dtype to compute in, which is the dtype of the scales; None where the file does not state it."""
        raise NotImplementedError

    def groups(self) -> np.ndarray | None:
        """The group of each input [in]; None where they are contiguous and in order. Raises as `packed`."""
        return None

    def table(self) -> np.ndarray | None:
        """The value of each code [2**bits] float32; None where a value is linear in its code."""
        return None

    def symmetric(self) -> bool:
        """Whether every zero point is the middle of the codes' range, so that signed codes need none."""
        return False

    def reordered(self) -> bool | None:
        """Whether the inputs have to be sorted by group (act-order). None: a model cannot keep the matrix quantized, as
        the groups differ in size. Raises as `packed`."""
        groups = self.groups()
        regular = groups is None or bool((np.bincount(groups) == self.group_size).all())
        return groups is not None if regular else None

    def packed(self, start: int = 0, stop: int | None = None) -> Packed:
        """The rows from ``start`` to ``stop``, packed. Raises `InputError` where the file contradicts its format."""
        raise NotImplementedError

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Dequantize a slice, as `LazyTensor.read`. Whole rows are read. Peak memory is the result plus one chunk."""
        spans = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=False)]
        (start, stop), (left, right) = spans + [(0, n) for n in self.shape[len(spans) :]]
        result = np.empty((max(0, stop - start), max(0, right - left)), self.dtype)
        rows = max(1, CHUNK // self.shape[1] // 32) * 32  # in some formats 32 rows share words
        for first in range(start, stop if result.size else start, rows):
            last = min(first + rows, stop)
            result[first - start : last - start] = self.packed(first, last).dequantize()[:, left:right]
        return result


def stored_bytes(tensor: LazyTensor, count: int) -> int:
    """Bytes of ``count`` numbers of a tensor: of the codes, if it is quantized."""
    return count * tensor.bits // 8 if isinstance(tensor, PackedTensor) else count * tensor.dtype.itemsize


def arithmetic_dtype(tensor: object) -> str:
    """The name of the dtype to compute in with a tensor: its own, or the dtype of the scales if it is quantized."""
    return getattr(tensor, "arithmetic", None) or tensor.dtype.name  # type: ignore[attr-defined]


def unpack(data: np.ndarray, bits: int) -> np.ndarray:
    """Unpack a bit stream, lowest bit first.

    Arguments:
        data: [..., n * bits / 8] uint8, with n a multiple of 8.
        bits: bits per code.

    Returns:
        The codes, [..., n] uint8.
    """
    lead, mask = data.shape[:-1], (1 << bits) - 1
    if 8 % bits == 0:
        codes = np.empty((*data.shape, 8 // bits), np.uint8)
        for k in range(8 // bits):
            np.right_shift(data, k * bits, out=codes[..., k])
        codes &= np.uint8(mask)
    else:  # 8 codes fill ``bits`` bytes
        parts = data.reshape(*lead, -1, bits)
        words = np.zeros(parts.shape[:-1], np.uint64)
        for k in range(bits):
            words |= parts[..., k].astype(np.uint64) << np.uint64(8 * k)
        codes = np.empty((*words.shape, 8), np.uint8)
        for k in range(8):
            codes[..., k] = (words >> np.uint64(k * bits)) & np.uint64(mask)
    return codes.reshape(*lead, data.shape[-1] * 8 // bits)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes into a bit stream: the inverse of `unpack`."""
    parts = codes.reshape(*codes.shape[:-1], -1, 8)
    words = np.zeros(parts.shape[:-1], np.uint64)
    for k in range(8):
        words |= parts[..., k].astype(np.uint64) << np.uint64(k * bits)
    data = np.ascontiguousarray(words.astype("<u8")).view(np.uint8).reshape(*words.shape, 8)[..., :bits]
    return np.ascontiguousarray(data).reshape(*codes.shape[:-1], codes.shape[-1] * bits // 8)


def words_of_columns(tensor: LazyTensor, bits: int, start: int, stop: int) -> np.ndarray:
    """Unpack the columns ``start`` to ``stop`` of a matrix whose rows are bit streams in 32-bit words.

    Arguments:
        tensor: [rows, columns * bits / 32] int32. Only the words of these columns are read.
        bits: bits per code.
        start: the first column.
        stop: the end of the columns.

    Returns:
        The codes, [rows, stop - start] uint8.
    """
    first = start // 32 * 32  # every 32nd code starts at a word boundary
    last = min(-(-stop // 32) * 32, tensor.shape[1] * 32 // bits)
    words = np.ascontiguousarray(tensor.read((slice(None), slice(first * bits // 32, last * bits // 32))))
    return unpack(words.view(np.uint8), bits)[:, start - first : stop - first]
