"""Quantize matrices with scales and zero points, and pack them as GPTQ and AWQ folders do.

`round_to_nearest` needs no data. What chooses codes from data (`minicpm_data.calibration`) hands them to the same
packers. The layouts are those that `gptq` and `awq` read.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed
from weights_io.parameters import EMBEDDING, HEAD, is_router, module_name, parameters
from weights_io.quantization.awq import INTERLEAVED
from weights_io.quantization.entries import BITS
from weights_io.quantization.packed import Packed, pack

Chooser = Callable[[str, np.ndarray], Packed]  # (module, matrix [out, in] float32) -> its codes


def round_to_nearest(matrix: np.ndarray, bits: int, group_size: int, symmetric: bool) -> Packed:
    """Quantize each group of a row by itself, as the ``Quantizer`` of AutoGPTQ and AutoAWQ.

    Arguments:
        matrix: [out, in] float32.
        bits: of a code.
        group_size: consecutive inputs with one scale and one zero point.
        symmetric: the zero point is the middle of the codes; otherwise it is chosen, and never 0, which the first
            format of GPTQ cannot store.

    Returns:
        The codes, with float16 scales.
    """
    groups = matrix.astype(np.float32).reshape(len(matrix), -1, group_size)
    scales, zeros = grid(groups, bits, symmetric)
    codes = np.rint(groups / scales[..., None].astype(np.float32)) + zeros[..., None]
    codes = np.clip(codes, 0, 2**bits - 1).astype(np.uint8).reshape(matrix.shape)
    return Packed(codes, scales, bits, group_size, zeros=zeros)


def grid(groups: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """The scales (float16) and zero points (int32), both [...], of groups of weights [..., n]."""
    most = 2**bits - 1
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    with np.errstate(over="ignore"):  # told below
        scales = ((high - low) / most).astype(np.float16)
    if not np.isfinite(scales).all():
        raise InputError("a weight is too large for scales in float16; this format cannot hold the model.")
    scales = np.where(scales == 0, np.float16(1), scales)  # a group of zeros
    if symmetric:
        return scales, np.full(scales.shape, (most + 1) // 2, np.int32)
    return scales, np.clip(np.rint(-low / scales.astype(np.float32)), 1, most).astype(np.int32)


@dataclass(frozen=True)
class ZeroPoints:
    """How the matrices of the layers are quantized; embedding, head and routers are not.

    Arguments:
        form: ``gptq`` or ``awq``.
        bits, group_size, symmetric: as in `round_to_nearest`.
        chosen: gives the codes of a matrix; None: `round_to_nearest`.

    Raises:
        InputError: the format has no such bits, or AWQ is asked for symmetric codes.
    """

    form: str
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    chosen: Chooser | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.bits not in BITS[self.form]:
            raise InputError(
                f"is {self.bits}; {self.form.upper()} has {', '.join(map(str, BITS[self.form]))}.", "q_bits"
            )

    @property
    def keys(self) -> dict[str, Any]:
        """The entries of config.json that describe the quantization."""
        common = {"quant_method": self.form, "bits": self.bits, "group_size": self.group_size}
        if self.form == "awq":
            return {
                "quantization_config": common | {"zero_point": True, "version": "gemm", "modules_to_not_convert": None}
            }
        of_gptq = {"desc_act": False, "sym": self.symmetric, "checkpoint_format": "gptq", "lm_head": False}
        return {"quantization_config": common | of_gptq}

    @property
    def files(self) -> dict[str, str]:
        """GPTQ's second copy of the settings, which older readers take."""
        if self.form == "awq":
            return {}
        return {"quantize_config.json": json.dumps(self.keys["quantization_config"], indent=2) + "\n"}

    def matrices(self, config: ModelConfig) -> list[str]:
        """The tensors to quantize. Raises `InputError` where the format cannot pack one of them."""
        names = []
        for parameter in parameters(config):
            shape = parameter.tensor_shape(config)
            whole = is_router(parameter) or parameter.of_vision
            if len(shape) != 2 or whole or parameter.hf_name in (EMBEDDING.hf_name, HEAD.hf_name):
                continue
            self._check(parameter.hf_names(config)[0], *shape)
            names += parameter.hf_names(config)
        return names

    def parts(self, config: ModelConfig, tensors: Mapping[str, Computed]) -> dict[str, Computed]:
        """The tensors to write. A matrix is quantized when its first part is read; the others are kept until then."""
        packed = set(self.matrices(config))
        found: dict[str, Computed] = {}
        for name, tensor in tensors.items():
            found |= self._parts(module_name(name), tensor) if name in packed else {name: tensor}
        return found

    def packed(self, module: str, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """The parts of a matrix [out, in] as they are stored."""
        matrix = matrix.astype(np.float32)
        if self.chosen is not None:
            codes = self.chosen(module, matrix)
        else:
            codes = round_to_nearest(matrix, self.bits, self.group_size, self.symmetric)
        return gptq_parts(codes) if self.form == "gptq" else awq_parts(codes)

    def _check(self, name: str, outputs: int, inputs: int) -> None:
        if inputs % self.group_size:
            raise InputError(
                f"the group size {self.group_size} does not divide the {inputs} inputs of {name}; choose another "
                "{q_group_size}.",
                others=["q_group_size"],
            )
        words = 8 if self.form == "awq" else 32
        if outputs * (1 if self.form == "awq" else self.bits) % words or (
            self.form == "gptq" and inputs * self.bits % 32
        ):
            raise InputError(
                f"{name} is [{outputs}, {inputs}], which {self.form.upper()} cannot pack in words of 32 bits."
            )

    def _parts(self, module: str, tensor: Computed) -> dict[str, Computed]:
        outputs, inputs = tensor.shape
        groups, bits = inputs // self.group_size, self.bits
        kept: dict[str, np.ndarray] = {}

        def make(part: str) -> np.ndarray:
            if part not in kept:
                kept.update(self.packed(module, tensor.make()))
            return kept.pop(part)

        words = np.dtype(np.int32)
        shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {"scales": ((groups, outputs), np.dtype(np.float16))}
        if self.form == "awq":
            shapes |= {"qweight": ((inputs, outputs // 8), words), "qzeros": ((groups, outputs // 8), words)}
        else:
            shapes |= {"qweight": ((inputs * bits // 32, outputs), words), "g_idx": ((inputs,), words)}
            shapes["qzeros"] = ((groups, outputs * bits // 32), words)
        return {f"{module}.{part}": Computed(*shapes[part], functools.partial(make, part)) for part in shapes}


def gptq_parts(packed: Packed) -> dict[str, np.ndarray]:
    """The parts of a matrix in AutoGPTQ's first format, which stores zero points minus 1."""
    assert packed.zeros is not None
    inputs = packed.codes.shape[1]
    groups = np.arange(inputs) // packed.group_size if packed.groups is None else packed.groups
    stored = (packed.zeros - 1).astype(np.uint8)
    return {
        "qweight": np.ascontiguousarray(pack(packed.codes, packed.bits).view(np.int32).T),
        "qzeros": pack(np.ascontiguousarray(stored.T), packed.bits).view(np.int32),
        "scales": np.ascontiguousarray(packed.scales.T),
        "g_idx": groups.astype(np.int32),
    }


def awq_parts(packed: Packed) -> dict[str, np.ndarray]:
    """The parts of a matrix in AutoAWQ's GEMM format."""
    assert packed.zeros is not None

    def words(codes: np.ndarray) -> np.ndarray:  # [n, out]
        shuffled = codes.reshape(len(codes), -1, 8)[..., INTERLEAVED].reshape(codes.shape)
        return pack(np.ascontiguousarray(shuffled), 4).view(np.int32)

    return {
        "qweight": words(packed.codes.T),
        "qzeros": words(packed.zeros.T.astype(np.uint8)),
        "scales": np.ascontiguousarray(packed.scales.T),
    }
