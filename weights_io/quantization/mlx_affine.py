"""MLX's affine format, read as `mlx_lm.convert` writes it and written as `mx.quantize` does.

Layout of a matrix [N out, K in], with w = code * scale + bias:

- ``weight`` uint32 [N, K * bits / 32]: row n is the stream of its codes, lowest bit first. Codes of 3, 5 and 6 bits
  cross word boundaries.
- ``scales`` and ``biases`` [N, K / group].

`quantize` equals `mx.quantize` on a CPU bit for bit: the codes, scales and biases in float32, float16 and bfloat16.
Source: mlx 0.32.4, mlx/backend/cpu/quantized.cpp.
"""

from dataclasses import dataclass

import numpy as np

from weights_io.errors import InputError, short
from weights_io.files.tensor import LazyTensor
from weights_io.quantization.entries import BITS, GROUPS, LABELS, Scheme
from weights_io.quantization.packed import CHUNK, Packed, PackedTensor, pack, unpack
from weights_io.quantization.parts import check_parts

REQUIRED, OPTIONAL = ("weight", "scales", "biases"), ()
SMALLEST_SCALE = np.float32(1e-7)


@dataclass(frozen=True)
class AffineTensor(PackedTensor):
    weight: LazyTensor
    scales: LazyTensor
    biases: LazyTensor

    parts = ("biases",)

    @property
    def kind(self) -> str:
        return f"{LABELS['mlx']} {self.bits}-bit {self.grouping}"

    @property
    def arithmetic(self) -> str:
        return self.scales.dtype.name

    def packed(self, start: int = 0, stop: int | None = None) -> Packed:
        rows = (slice(start, stop),)
        words = np.ascontiguousarray(self.weight.read(rows))
        return Packed(
            codes=unpack(words.view(np.uint8), self.bits),
            scales=self.scales.read(rows),
            bits=self.bits,
            group_size=self.group_size,
            biases=self.biases.read(rows),
        )


def open_tensor(name: str, parts: dict[str, LazyTensor], shape: tuple[int, int], scheme: Scheme) -> AffineTensor:
    """The lazy tensor of a packed matrix. Arguments and errors are those of `gptq.open_tensor`.

    Where config.json does not name the module, bits and group size follow from its shapes, as in mlx_lm.
    """
    outputs, inputs = shape
    named = scheme.modules.get(name, (scheme.bits, scheme.group_size))
    if named is None:
        raise InputError(
            f"{short(name)} in {parts['weight'].source} is packed, and {scheme.source} says false of it; correct it."
        )
    bits, group = named
    words, scales = parts["weight"].shape[-1:], parts["scales"].shape[-1:]
    if name not in scheme.modules and words and scales and scales[0]:
        found = words[0] * 32 // inputs, inputs // scales[0]
        bits, group = found if found[0] in BITS["mlx"] and found[1] in GROUPS["mlx"] else named
    if inputs % group:
        raise InputError(f"rows of {inputs} in {short(name)} have no groups of {group}; correct {scheme.source}.")
    expected = {
        "weight": (np.dtype(np.uint32), (outputs, inputs * bits // 32)),
        "scales": (None, (outputs, inputs // group)),
        "biases": (None, (outputs, inputs // group)),
    }
    check_parts(name, parts, expected, scheme, shape)
    return AffineTensor(shape, parts["weight"].source, bits, group, *(parts[part] for part in REQUIRED))


def quantize(matrix: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize a matrix as `mx.quantize` does.

    In each group, the value with the largest magnitude is kept exactly, up to rounding to the matrix's dtype.

    Arguments:
        matrix: [..., in].
        bits: bits per code.
        group: consecutive values of a row with one scale and one bias.

    Returns:
        ``weight`` (uint32), ``scales`` and ``biases`` (in the matrix's dtype).

    Raises:
        InputError: the group size does not divide a row.
    """
    *lead, inputs = matrix.shape
    if inputs % group:
        raise InputError(f"rows of {inputs} have no groups of {group}; choose another group size.")
    codes = np.empty((matrix.size // group, group), np.uint8)
    scales, biases = (np.empty(len(codes), matrix.dtype) for _ in range(2))
    flat = matrix.reshape(-1, group)
    for start in range(0, len(flat), max(1, CHUNK // group)):
        part = slice(start, start + max(1, CHUNK // group))
        codes[part], scale, bias = _affine(flat[part].astype(np.float32), np.float32(2**bits - 1))
        scales[part], biases[part] = scale.astype(matrix.dtype), bias.astype(matrix.dtype)
    words = pack(codes.reshape(*lead, inputs), bits).view("<u4").astype(np.uint32, copy=False)
    return words, scales.reshape(*lead, -1), biases.reshape(*lead, -1)


def _affine(groups: np.ndarray, most: np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and biases of groups [G, size], in float32.

    Of a group's minimum and maximum, the one farther from 0 has an exact code. So has 0, if it is between them.
    """
    low, high = groups.min(-1), groups.max(-1)
    low_is_farther = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / most, SMALLEST_SCALE)
    scale = np.where(low_is_farther, scale, -scale)
    edge = np.where(low_is_farther, low, high)
    steps = np.rint(edge / scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(steps != 0, edge / steps, scale)
    bias = np.where(steps != 0, edge, np.float32(0))
    codes = np.rint((groups - bias[:, None]) / scale[:, None])
    return np.clip(codes, 0, most).astype(np.uint8), scale, bias
