"""bitsandbytes as transformers saves it: NF4 and FP4 in blocks of the flattened matrix, and int8 with a scale per row.

4 bits, for a matrix [N out, K in]:

- ``weight`` uint8 [N * K / 2, 1]: two codes per byte, the first one in the high half.
- ``weight.absmax`` float32: one scale per block (64 values) of the flattened matrix.
- ``weight.quant_map`` float32 [16]: the value of each code.
- ``weight.quant_state.bitsandbytes__nf4`` (or __fp4): the bytes of a JSON object.

With double quantization ``weight.absmax`` is uint8. The scale of a block is then
nested_quant_map[absmax] * nested_absmax[block // nested_blocksize] + nested_offset.

8 bits (LLM.int8):

- ``weight`` int8 [N, K].
- ``SCB`` float32 [N]: the largest magnitude of each row.
- ``weight_format``: 0.

Source: bitsandbytes 0.50.2, functional.py (QuantState, dequantize_4bit, int8_vectorwise_dequant), nn/modules.py.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from weights_io.errors import InputError, listed, short, shown
from weights_io.files.json_text import parse_object
from weights_io.files.tensor import LazyTensor
from weights_io.quantization.entries import LABELS, Scheme
from weights_io.quantization.packed import Packed, PackedTensor, unpack
from weights_io.quantization.parts import FLOATS, check_complete, check_parts

STATE = "weight.quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")
FOUR = ("weight", "weight.absmax", "weight.quant_map")
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
EIGHT, EIGHT_OPTIONAL = ("weight", "SCB"), ("weight_format",)
MAX_STATE = 4096  # bytes of the JSON object; usually it has about 170
STATE_KEYS = frozenset(  # nested_*: only with double quantization
    "quant_type blocksize dtype shape nested_blocksize nested_dtype nested_offset".split()
)
INT8_FACTOR = float(np.float32(1 / 127))  # bitsandbytes multiplies by the rounded reciprocal


@dataclass(frozen=True)
class FourBitTensor(PackedTensor):
    quant_type: str  # nf4 | fp4
    compute_dtype: str
    block: int  # values of the flattened matrix per scale; group_size is gcd(K, block), so no group spans two rows
    weight: LazyTensor
    absmax: LazyTensor
    quant_map: LazyTensor
    nested: "_Nested | None"

    @property
    def kind(self) -> str:
        double = " (double)" if self.nested else ""
        return f"{LABELS['bitsandbytes']} {self.quant_type}{double} in groups of {self.block}"

    @property
    def arithmetic(self) -> str:
        return self.compute_dtype

    def table(self) -> np.ndarray:
        return self.quant_map.read()

    def packed(self, start: int = 0, stop: int | None = None) -> Packed:
        outputs, inputs = self.shape
        stop = outputs if stop is None else stop
        first, last = start * inputs, stop * inputs  # in the flattened matrix
        halves = unpack(self.weight.read((slice(first // 2, -(-last // 2)),)).reshape(-1), 4).reshape(-1, 2)
        codes = halves[:, ::-1].reshape(-1)[first % 2 : first % 2 + last - first]
        groups = np.arange(first // self.group_size, last // self.group_size) * self.group_size // self.block
        blocks = self._absmax(int(groups[0]), int(groups[-1]) + 1) if groups.size else np.empty(0, np.float32)
        scales = blocks[groups - groups[0]] if groups.size else blocks
        return Packed(
            codes=codes.reshape(stop - start, inputs),
            scales=scales.reshape(stop - start, inputs // self.group_size),
            bits=4,
            group_size=self.group_size,
            table=self.table(),
        )

    def _absmax(self, start: int, stop: int) -> np.ndarray:
        """The scales of the blocks ``start`` to ``stop``, in float32."""
        stored = self.absmax.read((slice(start, stop),))
        if self.nested is None:
            return stored
        of_block = self.nested.absmax.read()[np.arange(start, stop) // self.nested.block]
        return self.nested.quant_map.read()[stored] * of_block + np.float32(self.nested.offset)


@dataclass(frozen=True)
class _Nested:
    """The parameters of double quantization, which quantizes ``absmax`` itself."""

    absmax: LazyTensor
    quant_map: LazyTensor
    block: int
    offset: float


@dataclass(frozen=True)
class Int8Tensor(PackedTensor):
    weight: LazyTensor
    row_max: LazyTensor

    @property
    def kind(self) -> str:
        return f"{LABELS['bitsandbytes']} int8 in whole rows"

    @property
    def arithmetic(self) -> None:
        return None  # the file does not state it

    def packed(self, start: int = 0, stop: int | None = None) -> Packed:
        rows = (slice(start, stop),)
        codes, scales = self.weight.read(rows), self.row_max.read(rows)[:, None]
        return Packed(codes, scales, bits=8, group_size=self.group_size, factor=INT8_FACTOR)


def open_tensor(name: str, parts: dict[str, LazyTensor], shape: tuple[int, int], scheme: Scheme) -> PackedTensor:
    """The lazy tensor of a packed matrix. Arguments and errors are those of `gptq.open_tensor`.

    A few bytes are read: the quantization state of a 4-bit matrix, or the weight format of an 8-bit one.
    """
    return _int8(name, parts, shape, scheme) if scheme.bits == 8 else _four_bit(name, parts, shape, scheme)


def _four_bit(name: str, parts: dict[str, LazyTensor], shape: tuple[int, int], scheme: Scheme) -> PackedTensor:
    states = [part for part in parts if part.startswith(STATE)]
    label = f"{LABELS['bitsandbytes']} in 4 bits"
    double = any(part in parts for part in NESTED)
    check_complete(name, parts, (*FOUR, *(NESTED if double else ()), *(states or [f"{STATE}nf4"])), (), label)
    state = _state(f"{name}.{states[0]}", parts[states[0]], shape, double)
    if states[1:] or states[0] != f"{STATE}{state['quant_type']}":
        raise InputError(
            f"{short(name)} in {parts['weight'].source} has {listed(states)} of another type; download it again."
        )
    size, block = math.prod(shape), state["blocksize"]
    blocks, half = -(-size // block), -(-size // 2)
    column = (half, 1) if parts["weight"].shape[-1:] == (1,) else (half,)
    byte, full = np.dtype(np.uint8), np.dtype(np.float32)
    expected: dict[str, tuple[np.dtype | None, tuple[int, ...]]] = {
        "weight": (byte, column),
        "weight.absmax": (byte if double else full, (blocks,)),
        "weight.quant_map": (full, (16,)),
    }
    nested = None
    if double:
        of_blocks = -(-blocks // state["nested_blocksize"])
        expected |= {NESTED[0]: (full, (of_blocks,)), NESTED[1]: (full, (256,))}
        nested = _Nested(parts[NESTED[0]], parts[NESTED[1]], state["nested_blocksize"], state["nested_offset"])
    check_parts(name, parts, expected, scheme, shape)
    return FourBitTensor(
        shape=shape,
        source=parts["weight"].source,
        bits=4,
        group_size=math.gcd(shape[1], block),
        quant_type=state["quant_type"],
        compute_dtype=state["dtype"],
        block=block,
        weight=parts["weight"],
        absmax=parts["weight.absmax"],
        quant_map=parts["weight.quant_map"],
        nested=nested,
    )


def _state(name: str, tensor: LazyTensor, shape: tuple[int, int], double: bool) -> dict[str, Any]:
    """The JSON object of a quantization state. Raises `InputError` where a key is unknown or its value does not fit."""
    what = f"{short(name)} in {tensor.source}"
    if tensor.dtype != np.uint8 or len(tensor.shape) != 1 or tensor.shape[0] > MAX_STATE:
        raise InputError(f"{what} is no JSON text of at most {MAX_STATE} bytes; download it again.")
    state = parse_object(tensor.read().tobytes(), what, MAX_STATE)
    checks = {
        "quant_type": state.get("quant_type") in TYPES,
        "blocksize": _is_block(state.get("blocksize")),
        "dtype": state.get("dtype") in FLOATS,
        "shape": state.get("shape") == list(shape),
    }
    if double:
        offset = state.get("nested_offset")
        checks |= {
            "nested_blocksize": _is_block(state.get("nested_blocksize")),
            "nested_dtype": state.get("nested_dtype") == "float32",
            "nested_offset": isinstance(offset, float) and math.isfinite(offset),
        }
    checks |= dict.fromkeys(state.keys() - STATE_KEYS, False)
    if wrong := [key for key, holds in checks.items() if not holds]:
        raise InputError(
            f"{what} has {short(wrong[0])} {shown(state.get(wrong[0]))}, which is not that of a matrix of "
            f"{list(shape)} as bitsandbytes packs it; download it again."
        )
    return state


def _is_block(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _int8(name: str, parts: dict[str, LazyTensor], shape: tuple[int, int], scheme: Scheme) -> PackedTensor:
    check_complete(name, parts, EIGHT, EIGHT_OPTIONAL, f"{LABELS['bitsandbytes']} in 8 bits")
    byte = np.dtype(np.uint8)
    expected: dict[str, tuple[np.dtype | None, tuple[int, ...]]] = {
        "weight": (np.dtype(np.int8), shape),
        "SCB": (np.dtype(np.float32), (shape[0],)),
        "weight_format": (byte, ()),
    }
    check_parts(name, parts, expected, scheme, shape)
    form = parts.get("weight_format")
    if form is not None and int(form.read()) != 0:
        raise InputError(
            f"{short(name)}.weight_format in {form.source} is {int(form.read())}, an order of columns for one kind of "
            "GPU; save the model again with a newer bitsandbytes."
        )
    return Int8Tensor(shape, parts["weight"].source, 8, shape[1], parts["weight"], parts["SCB"])
