"""Fused linear layers that share an input: q, k and v; gate and up.

The layers keep their weights, which become views of rows of one matrix. Nothing is copied, and names, adapters,
loading and export are unaffected. If a layer is later replaced (by an adapter, by quantization) or given another
weight, this is noticed and its group runs layer by layer again.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from minicpm_mlx.layers.ops import scale


class FusedLinear:
    """y = x W^T of several layers side by side: one product and one transpose in a step's graph instead of one per
    layer."""

    def __init__(self, layers: Sequence[Any]):
        """Fuse layers that are `can_fuse`; each layer's weight becomes a view of its rows of the matrix."""
        ends = [0]
        for layer in layers:
            ends.append(ends[-1] + len(layer.weight))
        matrix = mx.concatenate([layer.weight for layer in layers])
        for layer, start, end in zip(layers, ends, ends[1:], strict=False):
            layer.weight = matrix[start:end]
        self.weights = [layer.weight for layer in layers]
        self.transposed = matrix.T
        mx.eval(self.transposed, self.weights)

    def holds(self, layers: Sequence[Any]) -> bool:
        """Whether these layers still hold the weights that were fused."""
        return can_fuse(layers) and all(
            layer.weight is weight for layer, weight in zip(layers, self.weights, strict=True)
        )

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.transposed


def can_fuse(layers: Sequence[Any]) -> bool:
    """Whether all are plain linear layers without bias, neither adapted nor quantized."""
    return all(type(layer) is nn.Linear and "bias" not in layer for layer in layers)


def runs_fused(module: Any, x: mx.array) -> bool:
    """Whether the layers of a module's group run fused for x [B, T, I]; drops the fused matrix if they no longer
    can. Only single tokens run fused: for a longer chunk the number of graph nodes does not matter, and MLX's BLAS
    on Linux takes twice as long for one product of 32 rows and 7680 outputs as for two of 3840."""
    if module._fused is not None and not module._fused.holds(module.fusable()):
        module._fused = None
    return module._fused is not None and x.shape[1] == 1


def fuse(model: nn.Module) -> None:
    """Fuse every group of the model's layers that can be, one at a time: only one group's weights are held twice at
    once. On a model that is fused already this is only a check."""
    for _, module in model.named_modules():
        if hasattr(module, "fusable"):
            layers = module.fusable()
            if (module._fused is None or not module._fused.holds(layers)) and can_fuse(layers):
                module._fused = FusedLinear(layers)


def added(x: mx.array, layer: Any, inner: mx.array, factor: float) -> mx.array:
    """x + factor * layer(inner). For a plain layer this is one product, rounded once."""
    if can_fuse([layer]):
        return mx.addmm(x, inner, layer.weight.T, alpha=factor)
    return x + scale(layer(inner), factor)
