"""The layer of a LoRA or DoRA adapter."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

LoRAParams = dict[str, mx.array]  # a [.., R, I], b [.., O, R], and for DoRA magnitude [.., O]


class LoRALayer(nn.Module):
    """Adapts y = W x to y + scale B A x. DoRA also multiplies each output by magnitude / norm of the row of W +
    scale B A."""

    def __init__(self, base: nn.Module, params: LoRAParams, scale: float, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.a, self.b, self.magnitude = params["a"], params["b"], params.get("magnitude")
        self.scale, self.dropout = scale, dropout
        self._key: mx.array | None = None  # dropout key; None: no dropout
        self._ratio: mx.array | None = None  # cached by `cache_dora_ratios`

    def __call__(self, x: mx.array, *experts: Any) -> mx.array:
        """``experts``: the arguments of a stacked layer's call, such as each row's expert (see `ExpertLinear`)."""
        y = self.base(x, *experts)
        x = x.astype(self.a.dtype)
        if self._key is not None:
            keep = mx.random.bernoulli(1 - self.dropout, x.shape, key=self._key)
            x = mx.where(keep, x / (1 - self.dropout), 0)
        if experts:
            low = mx.gather_mm(x, self.a.swapaxes(-1, -2), rhs_indices=experts[0])
            added = self.scale * mx.gather_mm(low, self.b.swapaxes(-1, -2), rhs_indices=experts[0])
        else:
            added = self.scale * ((x @ self.a.T) @ self.b.T)
        if self.magnitude is None:
            return y + added.astype(y.dtype)
        ratio = self.ratio() if self._ratio is None else self._ratio
        return ((y + added) * (ratio[experts[0]][..., None, :] if experts else ratio)).astype(y.dtype)

    def ratio(self) -> mx.array:
        """DoRA's magnitudes over the norms [.., O] of the rows of W + scale B A. The norms are treated as constants
        (section 4.3 of the paper), and W + scale B A is never built."""
        wide, a, b = (mx.stop_gradient(x) for x in (dense(self.base).astype(mx.float32), self.a, self.b))
        inner = 2 * wide @ a.swapaxes(-1, -2) + self.scale * (b @ (a @ a.swapaxes(-1, -2)))
        assert self.magnitude is not None
        squares = (wide * wide).sum(axis=-1) + self.scale * (b * inner).sum(axis=-1)
        return self.magnitude / mx.sqrt(squares)


def dense(layer: Any) -> mx.array:
    """The weight [.., O, I] of a layer, dequantized if necessary."""
    if "scales" not in layer:
        return layer.weight
    if hasattr(layer, "dequantized"):  # `quantization.packed`
        return layer.dequantized()
    return mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)


def effective_weight(layer: Any, dtype: mx.Dtype) -> mx.array:
    """The weight [O, I] with which a linear layer multiplies, adapted and dequantized, in ``dtype``. An adapter's
    dropout is not in it."""
    if not isinstance(layer, LoRALayer):
        return dense(layer).astype(dtype)
    wide = dense(layer.base).astype(layer.b.dtype) + layer.scale * (layer.b @ layer.a)
    if layer.magnitude is not None:
        wide = wide * (layer.ratio() if layer._ratio is None else layer._ratio)[:, None]
    return wide.astype(dtype)
