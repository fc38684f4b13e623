"""Quantize tensors in MLX's affine format while they are written, as `mlx_lm.convert -q` does."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed
from weights_io.parameters import is_router, module_name, parameters
from weights_io.quantization.entries import BITS, GROUPS
from weights_io.quantization.mlx_affine import REQUIRED, quantize


@dataclass(frozen=True)
class Affine:
    """How the matrices are quantized. Raises `InputError` for bits or a group size that MLX does not support."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        for name, value, known in (("bits", self.bits, BITS["mlx"]), ("group_size", self.group_size, GROUPS["mlx"])):
            if value not in known:
                raise InputError(f"q_{name} is {value}; MLX has {', '.join(map(str, known))}.")

    @property
    def keys(self) -> dict[str, Any]:
        """The entries of config.json that describe the quantization."""
        entry = {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}
        return {"quantization": entry, "quantization_config": dict(entry)}

    def matrices(self, config: ModelConfig) -> list[str]:
        """The tensors to quantize: all matrices whose rows the group size divides, embedding and head included.

        Routers are not quantized: they are small, and they select the experts.

        Raises:
            InputError: the group size divides the rows of no matrix.
        """
        wide = [p for p in parameters(config) if len(p.tensor_shape(config)) == 2 and not (is_router(p) or p.of_vision)]
        names = [n for p in wide if p.tensor_shape(config)[-1] % self.group_size == 0 for n in p.hf_names(config)]
        if not names:
            raise InputError(
                f"the group size {self.group_size} divides the rows of no matrix; choose a smaller {{q_group_size}}.",
                others=["q_group_size"],
            )
        return names

    def parts(self, config: ModelConfig, tensors: Mapping[str, Computed]) -> dict[str, Computed]:
        """The tensors to write, with ``weight``, ``scales`` and ``biases`` in place of each quantized matrix.

        A matrix is quantized when its first part is read. Its other parts are kept in memory until they are read.

        Arguments:
            config: the model's config.
            tensors: all tensors to write, not quantized yet.
        """
        packed = set(self.matrices(config))
        found: dict[str, Computed] = {}
        for name, tensor in tensors.items():
            found |= self._parts(module_name(name), tensor) if name in packed else {name: tensor}
        return found

    def quantized(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``weight``, ``scales`` and ``biases`` of a matrix [out, in]."""
        return quantize(matrix, self.bits, self.group_size)

    def _parts(self, module: str, tensor: Computed) -> dict[str, Computed]:
        outputs, inputs = tensor.shape
        kept: dict[str, np.ndarray] = {}

        def make(part: str) -> np.ndarray:
            if part not in kept:
                kept.update(zip(REQUIRED, self.quantized(tensor.make()), strict=True))
            return kept.pop(part)

        shapes = {"weight": ((outputs, inputs * self.bits // 32), np.dtype(np.uint32))}
        shapes |= dict.fromkeys(REQUIRED[1:], ((outputs, inputs // self.group_size), tensor.dtype))
        return {f"{module}.{part}": Computed(*shapes[part], functools.partial(make, part)) for part in REQUIRED}
