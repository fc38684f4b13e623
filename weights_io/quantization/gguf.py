"""The quantized blocks of GGUF files as codes and scales.

A block is 32 weights with a float16 scale (Q4_0, Q5_0, Q8_0) and a minimum (Q4_1, Q5_1), or 256 weights in groups of 32
with scales and minima of 6 bits (Q4_K, Q5_K), or of 16 with signed scales of 8 bits (Q6_K). ``gguf.quants`` unpacks
them: the codes are the values of a block whose scales are 1. Blocks of other kinds have no such form here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from weights_io.files.gguf import BlockTensor, UnpermutedTensor
from weights_io.files.tensor import LazyTensor
from weights_io.quantization.packed import Packed, PackedTensor

ONE = np.frombuffer(np.float16(1).tobytes(), np.uint8)
ZERO = np.zeros(2, np.uint8)
SIXES = np.repeat(np.array([1, 0, 1], np.uint8), 4)  # of 6 bits: the scales are 1, the minima 0


@dataclass(frozen=True)
class BlockKind:
    """A kind of block.

    Attributes:
        bits: of a code; signed where there are no minima. Q6_K's 6 bits are those of an int8.
        group: weights with one scale.
        size, bytes: weights and bytes of a block.
        unit: place in the block -> bytes with which a value is its code.
        scales: blocks [n, bytes] -> scales and, if there are minima, biases, [n, groups of a block].
    """

    bits: int
    group: int
    size: int
    bytes: int
    unit: Mapping[int, np.ndarray]
    scales: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
    minima: bool = False


def _halves(blocks: np.ndarray, place: int) -> np.ndarray:
    """The float16 at a place of each block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, place : place + 2]).view(np.float16)


def _of_block(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    return _halves(blocks, 0), None


def _of_block_with_minimum(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    return _halves(blocks, 0), _halves(blocks, 2)


def _of_super_block(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    from gguf.quants import Q4_K

    d, low = (_halves(blocks, place).astype(np.float32) for place in (0, 2))
    scales, minima = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    return d * scales.astype(np.float32), -(low * minima.astype(np.float32))


def _of_six_bits(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _halves(blocks, 208).astype(np.float32) * scales, None


_SUPER = {0: ONE, 2: ZERO, 4: SIXES}
KINDS = {
    "Q4_0": BlockKind(4, 32, 32, 18, {0: ONE}, _of_block),
    "Q5_0": BlockKind(5, 32, 32, 22, {0: ONE}, _of_block),
    "Q8_0": BlockKind(8, 32, 32, 34, {0: ONE}, _of_block),
    "Q4_1": BlockKind(4, 32, 32, 20, {0: ONE, 2: ZERO}, _of_block_with_minimum, minima=True),
    "Q5_1": BlockKind(5, 32, 32, 24, {0: ONE, 2: ZERO}, _of_block_with_minimum, minima=True),
    "Q4_K": BlockKind(4, 32, 256, 144, _SUPER, _of_super_block, minima=True),
    "Q5_K": BlockKind(5, 32, 256, 176, _SUPER, _of_super_block, minima=True),
    "Q6_K": BlockKind(8, 16, 256, 210, {192: np.ones(16, np.uint8), 208: ONE}, _of_six_bits),
}


@dataclass(frozen=True)
class GGUFTensor(PackedTensor):
    """A matrix in blocks. ``whole`` dequantizes it; ``blocks`` are its bytes, with the rows in the same order."""

    whole: LazyTensor
    blocks: LazyTensor
    block_kind: str

    @property
    def kind(self) -> str:
        return self.block_kind

    @property
    def arithmetic(self) -> None:
        """The scales are float16 or products in float32, whatever the model was computed in."""
        return None

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("biases",) if KINDS[self.block_kind].minima else ()

    def packed(self, start: int = 0, stop: int | None = None) -> Packed:
        from gguf import GGMLQuantizationType, quants

        kind = KINDS[self.block_kind]
        rows = np.ascontiguousarray(self.blocks.read((slice(start, stop),)))
        blocks = rows.reshape(-1, kind.bytes)
        scales, biases = kind.scales(blocks)
        unit = blocks.copy()
        for place, one in kind.unit.items():
            unit[:, place : place + len(one)] = one
        values = quants.dequantize(unit.reshape(rows.shape), GGMLQuantizationType[self.block_kind])
        codes = values.astype(np.uint8 if kind.minima else np.int8)

        def of_rows(array: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(array.reshape(len(rows), -1))

        return Packed(
            codes, of_rows(scales), self.bits, self.group_size, biases=None if biases is None else of_rows(biases)
        )

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.whole.read(index)


def as_packed(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of a GGUF file, with a `GGUFTensor` for each matrix in blocks of `KINDS`."""
    return {name: _as_packed(tensor) for name, tensor in tensors.items()}


def _as_packed(tensor: LazyTensor) -> LazyTensor:
    stored = tensor.stored if isinstance(tensor, UnpermutedTensor) else tensor
    if not isinstance(stored, BlockTensor) or stored.kind not in KINDS or len(stored.shape) != 2:
        return tensor
    blocks: LazyTensor = stored.packed
    if isinstance(tensor, UnpermutedTensor):
        blocks = UnpermutedTensor(blocks, tensor.head_dim)
    kind = KINDS[stored.kind]
    outputs, inputs = stored.shape
    return GGUFTensor((outputs, inputs), stored.source, kind.bits, kind.group, tensor, blocks, stored.kind)
