"""Ternary weights stored as floats, as of BitCPM4: in each group of a row there are -s, 0 and s, for one s.

MLX's affine format holds them exactly in 2 bits: with the scale s and the bias -s, the codes 0, 1 and 2 are -s, 0 and
s, without rounding in any dtype.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from weights_io.config import ModelConfig
from weights_io.files.tensor import LazyTensor
from weights_io.parameters import target_parameters
from weights_io.quantization.entries import GROUPS
from weights_io.quantization.packed import CHUNK, pack
from weights_io.quantization.writing import Affine

BITS = 2
SAMPLE = 32  # rows of a matrix that `sampled_group` reads


@dataclass(frozen=True)
class Ternary(Affine):
    """How ternary matrices are packed. The others are not."""

    bits: int = BITS
    group_size: int = 0
    names: frozenset[str] = field(default_factory=frozenset)  # of the tensors

    def matrices(self, config: ModelConfig) -> list[str]:
        return sorted(self.names)

    def quantized(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        groups = matrix.reshape(len(matrix), -1, self.group_size)
        scales = np.abs(groups).max(axis=-1)
        codes = (np.sign(groups.astype(np.float32)) + 1).astype(np.uint8).reshape(matrix.shape)
        return pack(codes, self.bits).view("<u4").astype(np.uint32, copy=False), scales, -scales


def ternary_packing(config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> Ternary | None:
    """The packing of a model's ternary matrices; None where it has none. All matrices of the layers are read."""
    groups = {name: group for name in _names(config) if (group := group_of(tensors[name])) is not None}
    if not groups:
        return None
    return Ternary(group_size=min(groups.values()), names=frozenset(groups))


def sampled_group(config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> int | None:
    """The group size of a model's ternary matrices, by some rows of those of its first layer; None where one is not
    ternary, or has no tensor."""
    found = []
    for parameter in target_parameters(config, ("all-linear",)):
        tensor = tensors.get(parameter.hf_names(config)[0])
        if tensor is None or tuple(tensor.shape) != parameter.tensor_shape(config):
            return None
        if (group := group_of(tensor, SAMPLE)) is None:  # no other matrix is read
            return None
        found.append(group)
    return min(found, default=None)


def group_of(tensor: LazyTensor, most: int | None = None) -> int | None:
    """The largest group size that MLX has and in which a matrix is ternary; None: it is not ternary.

    Arguments:
        tensor: a matrix [out, in].
        most: the number of rows to read; None: all.
    """
    rows, width = tensor.shape
    rows, step = min(rows, most or rows), max(1, CHUNK // width)
    possible = [group for group in sorted(GROUPS["mlx"]) if width % group == 0]
    for start in range(0, rows, step):
        values = np.abs(tensor.read((slice(start, min(start + step, rows)),)))
        while possible and not _is_ternary(values.reshape(-1, possible[-1])):
            possible.pop()
    return possible[-1] if possible else None


def _is_ternary(groups: np.ndarray) -> bool:
    """Whether magnitudes [G, size] are 0 or the largest of their group, which is finite."""
    largest = groups.max(axis=1, keepdims=True)
    return bool(np.isfinite(largest).all()) and bool(((groups == 0) | (groups == largest)).all())


def _names(config: ModelConfig) -> Iterable[str]:
    return (name for p in target_parameters(config, ("all-linear",)) for name in p.hf_names(config))
