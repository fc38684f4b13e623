"""The GPTQ format of AutoGPTQ, GPTQModel and transformers: 32-bit words of codes along the inputs.

Layout of a matrix [N out, K in] with G groups:

- ``qweight`` int32 [K * bits / 32, N]: column n is the stream of the codes of output n, lowest bit first. 3-bit codes
  cross word boundaries.
- ``qzeros`` int32 [G, N * bits / 32]: row g is the stream of the zero points of all outputs.
- ``scales`` [G, N].
- ``g_idx`` int32 [K]: the group of each input.

G is K / group size rounded up: the last group of a row may have fewer inputs than the others.

The first format ("gptq") stores zero points minus 1, "gptq_v2" without an offset. Act-order permutes only g_idx; the
inputs keep their order. Source: auto_gptq 0.7.1, nn_modules/qlinear/qlinear_cuda_old.py (pack, forward).
"""

import math
from dataclasses import dataclass

import numpy as np

from weights_io.errors import InputError, short
from weights_io.files.tensor import LazyTensor
from weights_io.quantization.entries import BEFORE_MARLIN, LABELS, Scheme
from weights_io.quantization.packed import Packed, PackedTensor, unpack, words_of_columns
from weights_io.quantization.parts import check_parts

REQUIRED, OPTIONAL = ("qweight", "qzeros", "scales"), ("g_idx",)
SMALLEST_PART = 8  # inputs; smaller parts would have more bytes of scales than of codes


@dataclass(frozen=True)
class GPTQTensor(PackedTensor):
    name: str  # the module's name
    qweight: LazyTensor
    qzeros: LazyTensor
    scales: LazyTensor
    g_idx: LazyTensor | None
    zero_offset: int
    stored_group: int  # inputs per stored group; group_size divides it where the last one has fewer

    parts = ("zeros",)

    @property
    def kind(self) -> str:
        return f"{LABELS['gptq']} {self.bits}-bit {self.grouping}"

    @property
    def grouping(self) -> str:
        return "in whole rows" if self.stored_group >= self.shape[1] else f"in groups of {self.stored_group}"

    @property
    def arithmetic(self) -> str:
        return self.scales.dtype.name

    def packed(self, start: int = 0, stop: int | None = None) -> Packed:
        stop = self.shape[0] if stop is None else stop
        columns = (slice(None), slice(start, stop))
        words = np.ascontiguousarray(self.qweight.read(columns).T)  # [n, K * bits / 32]
        zeros = words_of_columns(self.qzeros, self.bits, start, stop)
        if self.zero_offset and (zeros == (1 << self.bits) - 1).any():
            raise InputError(
                f"{short(self.name)}.qzeros in {self.source} has zero points of 0, which AutoGPTQ's first format "
                "cannot store (its readers disagree on them); quantize again with checkpoint_format gptq_v2, or "
                "symmetrically."
            )
        scales, zeros = np.ascontiguousarray(self.scales.read(columns).T), zeros.T.astype(np.int32) + self.zero_offset
        groups, parts = self._parts()
        if parts is not None:
            scales, zeros = scales[:, parts], zeros[:, parts]
        return Packed(
            codes=unpack(words.view(np.uint8), self.bits),
            scales=scales,
            bits=self.bits,
            group_size=self.group_size,
            zeros=np.ascontiguousarray(zeros),
            groups=groups,
        )

    def symmetric(self) -> bool:
        zeros = words_of_columns(self.qzeros, self.bits, 0, self.shape[0])
        return bool((zeros == (1 << self.bits - 1) - self.zero_offset).all())

    def groups(self) -> np.ndarray | None:
        return self._parts()[0]

    def _parts(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """`groups`, and the stored group of each group; None: they are the same."""
        inputs = self.shape[1]
        in_order = np.arange(inputs, dtype=np.int32)
        stored = self._stored_groups() if self.g_idx is not None else in_order // self.stored_group
        contiguous = np.array_equal(stored, in_order // self.stored_group)
        if self.stored_group == self.group_size and inputs % self.group_size == 0:
            return (None if contiguous else stored), None
        if (np.bincount(stored) % self.group_size).any():
            return stored, None  # a model cannot keep it quantized
        order = np.argsort(stored, kind="stable")
        groups = np.empty_like(stored)
        groups[order] = in_order // self.group_size
        return (None if contiguous else groups), stored[order][:: self.group_size]

    def _stored_groups(self) -> np.ndarray:
        assert self.g_idx is not None
        groups, count = self.g_idx.read().astype(np.int32), -(-self.shape[1] // self.stored_group)
        if groups.min() < 0 or groups.max() >= count:
            raise InputError(
                f"{short(self.name)}.g_idx in {self.source} names group "
                f"{groups.min() if groups.min() < 0 else groups.max()} of {count}; download it again."
            )
        return groups


def open_tensor(name: str, parts: dict[str, LazyTensor], shape: tuple[int, int], scheme: Scheme) -> GPTQTensor:
    """The lazy tensor of a packed matrix.

    Arguments:
        name: the module's name.
        parts: part name (``qweight``, ...) -> tensor.
        shape: the shape of the matrix, [out, in].
        scheme: the quantization scheme.

    Raises:
        InputError: the parts do not fit the shape and the scheme.
    """
    outputs, inputs = shape
    stored = inputs if scheme.group_size == -1 else scheme.group_size
    group, count = math.gcd(inputs, stored), -(-inputs // stored)
    bits, words = scheme.bits, np.dtype(np.int32)
    if inputs * bits % 32 or outputs * bits % 32:
        raise InputError(
            f"{short(name)} is [{outputs}, {inputs}], which {bits} bits do not pack in words of 32; correct "
            f"{scheme.source}."
        )
    if scheme.act_order and "g_idx" not in parts and count > 1:
        raise InputError(
            f"{short(name)} in {parts['qweight'].source} lacks g_idx, the group of each input, which desc_act of "
            f"{scheme.source} requires; download the weights again, whole."
        )
    if bits > 2 and tuple(parts["qweight"].shape) == (inputs // 16, outputs * bits // 2):
        raise InputError(f"{short(name)} in {parts['qweight'].source} {BEFORE_MARLIN}.")
    expected = {
        "qweight": (words, (inputs * bits // 32, outputs)),
        "qzeros": (words, (count, outputs * bits // 32)),
        "scales": (None, (count, outputs)),
        "g_idx": (words, (inputs,)),
    }
    check_parts(name, parts, expected, scheme, shape)
    return GPTQTensor(
        shape=shape,
        source=parts["qweight"].source,
        bits=bits,
        group_size=group if group >= min(SMALLEST_PART, stored) else stored,
        name=name,
        qweight=parts["qweight"],
        qzeros=parts["qzeros"],
        scales=parts["scales"],
        g_idx=parts.get("g_idx"),
        zero_offset=scheme.zero_offset,
        stored_group=stored,
    )
