"""Linear layers that read the same input, computed as one: q, k and v; gate and up.

The layers keep their weights, which become rows of one matrix: no copy, and names, adapters, loading and export see
what they always saw. A layer that is then replaced (by an adapter, by quantisation) or given another weight is noticed,
and its group computed one by one again.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from minicpm_mlx.layers.ops import scale


class Joined:
    """y = x W^T of several layers side by side: one product and one transpose in a step's graph, not one for each."""

    def __init__(self, layers: Sequence[Any]):
        """Of layers that `joinable` allows; each gets its rows of the matrix as its weight."""
        ends = [0]
        for layer in layers:
            ends.append(ends[-1] + len(layer.weight))
        matrix = mx.concatenate([layer.weight for layer in layers])
        for layer, start, end in zip(layers, ends, ends[1:], strict=False):
            layer.weight = matrix[start:end]
        self.weights = [layer.weight for layer in layers]
        self.turned = matrix.T
        mx.eval(self.turned, self.weights)

    def holds(self, layers: Sequence[Any]) -> bool:
        """Whether these layers still have the weights that they were given."""
        return joinable(layers) and all(
            layer.weight is weight for layer, weight in zip(layers, self.weights, strict=True)
        )

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.turned


def joinable(layers: Sequence[Any]) -> bool:
    """Plain linear layers without bias: none that is adapted or quantised."""
    return all(type(layer) is nn.Linear and "bias" not in layer for layer in layers)


def joined(module: Any, x: mx.array) -> bool:
    """Whether the layers of a module's group are computed as one for x [B, T, I]; gives up the matrix where they no
    longer can be. Only for single tokens: of a longer piece nodes are no matter, and the BLAS of MLX on Linux takes
    twice as long for one product of 32 rows and 7680 outputs as for two of 3840."""
    if module._joined is not None and not module._joined.holds(module.together()):
        module._joined = None
    return module._joined is not None and x.shape[1] == 1


def join(model: nn.Module) -> None:
    """Join the groups of a model's layers wherever they can be, one after the other: only one is there twice at a time.
    A model that is joined already costs no more than the looking."""
    for _, module in model.named_modules():
        if hasattr(module, "together"):
            layers = module.together()
            if (module._joined is None or not module._joined.holds(layers)) and joinable(layers):
                module._joined = Joined(layers)


def added(x: mx.array, layer: Any, inner: mx.array, factor: float) -> mx.array:
    """x + factor * layer(inner); of a plain layer in one product, rounded once."""
    if joinable([layer]):
        return mx.addmm(x, inner, layer.weight.T, alpha=factor)
    return x + scale(layer(inner), factor)
