"""The AWQ format of AutoAWQ's GEMM version: each 32-bit word packs the codes of 8 outputs, interleaved.

Layout of a matrix [N out, K in] with G groups: ``qweight`` int32 [K, N / 8], ``qzeros`` int32 [G, N / 8], ``scales``
[G, N]. Code i of a word, lowest bits first, belongs to output ``INTERLEAVED[i]`` of the 8. Zero points are stored
without an offset. Source: autoawq 0.2.9, awq/modules/linear/gemm.py (from_linear), awq/utils/packing_utils.py.
"""

from dataclasses import dataclass

import numpy as np

from weights_io.errors import InputError, short
from weights_io.files.tensor import LazyTensor
from weights_io.quantization.entries import LABELS, Scheme
from weights_io.quantization.packed import Packed, PackedTensor, unpack
from weights_io.quantization.parts import check_parts, groups_in

REQUIRED, OPTIONAL = ("qweight", "qzeros", "scales"), ()
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)
PLACES = tuple(INTERLEAVED.index(output) for output in range(8))


@dataclass(frozen=True)
class AWQTensor(PackedTensor):
    qweight: LazyTensor
    qzeros: LazyTensor
    scales: LazyTensor

    parts = ("zeros",)

    @property
    def kind(self) -> str:
        return f"{LABELS['awq']} {self.bits}-bit {self.grouping}"

    @property
    def arithmetic(self) -> str:
        return self.scales.dtype.name

    def packed(self, start: int = 0, stop: int | None = None) -> Packed:
        stop = self.shape[0] if stop is None else stop
        return Packed(
            codes=_outputs(self.qweight, start, stop),
            scales=np.ascontiguousarray(self.scales.read((slice(None), slice(start, stop))).T),
            bits=self.bits,
            group_size=self.group_size,
            zeros=_outputs(self.qzeros, start, stop).astype(np.int32),
        )


def _outputs(tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
    """Unpack the codes of the outputs ``start`` to ``stop``: [stop - start, rows of the tensor]."""
    first, last = start // 8, -(-stop // 8)
    words = np.ascontiguousarray(tensor.read((slice(None), slice(first, last))))
    codes = unpack(words.view(np.uint8), 4).reshape(len(words), -1, 8)[..., PLACES].reshape(len(words), -1)
    return np.ascontiguousarray(codes.T[start - first * 8 : stop - first * 8])


def open_tensor(name: str, parts: dict[str, LazyTensor], shape: tuple[int, int], scheme: Scheme) -> AWQTensor:
    """The lazy tensor of a packed matrix. Arguments and errors are those of `gptq.open_tensor`."""
    outputs, inputs = shape
    group, count = groups_in(name, inputs, scheme)
    words = np.dtype(np.int32)
    if outputs % 8:
        raise InputError(
            f"{short(name)} has {outputs} outputs, which AWQ does not pack in words of 8; take another file."
        )
    expected = {
        "qweight": (words, (inputs, outputs // 8)),
        "qzeros": (words, (count, outputs // 8)),
        "scales": (None, (count, outputs)),
    }
    check_parts(name, parts, expected, scheme, shape)
    return AWQTensor(shape, parts["qweight"].source, 4, group, *(parts[part] for part in REQUIRED))
