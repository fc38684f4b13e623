"""A model's tensors packed in MLX's affine form while they are written, as `mlx_lm.convert -q` packs them."""

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
    """How matrices are packed. Raises `InputError` for bits or groups that MLX has not."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        for name, value, known in (("bits", self.bits, BITS["mlx"]), ("group_size", self.group_size, GROUPS["mlx"])):
            if value not in known:
                raise InputError(f"q_{name} is {value}; MLX has {', '.join(map(str, known))}.")

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of config.json that tell mlx_lm, and this package, of it."""
        entry = {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}
        return {"quantization": entry, "quantization_config": dict(entry)}

    def matrices(self, config: ModelConfig) -> list[str]:
        """The tensors that are packed: all matrices, embedding and head too, whose rows have groups; no router, which
        is small and chooses. Raises `InputError` where there is none."""
        wide = [p for p in parameters(config) if len(p.tensor_shape(config)) == 2 and not is_router(p)]
        names = [n for p in wide if p.tensor_shape(config)[-1] % self.group_size == 0 for n in p.tensors(config)]
        if not names:
            raise InputError(
                f"no matrix of the model has rows of groups of {self.group_size}; choose a smaller {{q_group_size}}.",
                others=["q_group_size"],
            )
        return names

    def parts(self, config: ModelConfig, tensors: Mapping[str, Computed]) -> dict[str, Computed]:
        """The tensors to write, ``weight``, ``scales`` and ``biases`` in place of each packed matrix. Of a matrix that
        is packed for its first part the others are kept until they are asked for."""
        packed = set(self.matrices(config))
        found: dict[str, Computed] = {}
        for name, tensor in tensors.items():
            found |= self._parts(module_name(name), tensor) if name in packed else {name: tensor}
        return found

    def _parts(self, module: str, tensor: Computed) -> dict[str, Computed]:
        outputs, inputs = tensor.shape
        kept: dict[str, np.ndarray] = {}

        def make(part: str) -> np.ndarray:
            if part not in kept:
                kept.update(zip(REQUIRED, quantize(tensor.make(), self.bits, self.group_size), strict=True))
            return kept.pop(part)

        shapes = {"weight": ((outputs, inputs * self.bits // 32), np.dtype(np.uint32))}
        shapes |= dict.fromkeys(REQUIRED[1:], ((outputs, inputs // self.group_size), tensor.dtype))
        return {f"{module}.{part}": Computed(*shapes[part], functools.partial(make, part)) for part in REQUIRED}
