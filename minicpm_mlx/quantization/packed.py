"""Layers of a quantized checkpoint beside those of MLX: with reordered inputs, and with the values in a table."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from weights_io.quantization.affine import Layout
from weights_io.quantization.lookup import values_of_bytes


class Reordered(nn.Module):
    """A quantized layer whose groups consist of any inputs (GPTQ's act-order): it reorders its input first."""

    def set_order(self, order: np.ndarray) -> None:
        """Set the permutations [.., I] that sort the inputs by group."""
        self._order, self._inverse = mx.array(order.astype(np.int32)), mx.array(np.argsort(order).astype(np.int32))

    def sorted(self, x: mx.array, experts: mx.array | None = None) -> mx.array:
        """The input x [.., I] in the order of the groups; of [..., 1, I] each row for its one of ``experts`` [...]."""
        order = self.get("_order")
        if order is None:
            return x
        if experts is None:
            return mx.take(x, order, axis=-1)
        rows = mx.broadcast_to(x, (*experts.shape, *x.shape[-2:]))
        return mx.take_along_axis(rows, order[experts][..., None, :], axis=-1)

    def dequantized(self) -> mx.array:
        """The weight [.., O, I] with its inputs in the order of the checkpoint."""
        weight, inverse = self.values(), self.get("_inverse")
        return weight if inverse is None else mx.take_along_axis(weight, inverse[..., None, :], axis=-1)

    def values(self) -> mx.array:
        """The weight [.., O, I] with its inputs in the order of the groups."""
        return mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits)


class ReorderedLinear(Reordered, nn.QuantizedLinear):
    """A linear layer in MLX's affine form, with act-order."""

    def __call__(self, x: mx.array) -> mx.array:
        return nn.QuantizedLinear.__call__(self, self.sorted(x))


class ReorderedExperts(Reordered, QuantizedSwitchLinear):
    """The stacked weights of all experts in MLX's affine form, with act-order."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        return QuantizedSwitchLinear.__call__(self, self.sorted(x, indices), indices, sorted_indices)


class Lookup(Reordered):
    """A layer whose weight [.., O, I] is bytes and a table of their values (`weights_io.quantization.lookup`).

    MLX has no product for these. Each call dequantizes the weight, which is freed after the product: a step then moves
    about four times the bytes that the weight has in bfloat16 (lookup, scaling and product write and read it).
    """

    def __init__(self, shape: tuple[int, ...], layout: Layout):
        """``shape``: of the weight, [O, I], or [E, O, I] of experts. The arrays are still to be loaded."""
        super().__init__()
        *stack, width = shape
        self.bits, self.group_size = layout.bits, layout.group_size
        self.weight = mx.zeros((*stack, width * self.bits // 8), mx.uint8)
        self.scales = mx.zeros((*stack, width // self.group_size))
        if layout.zeros:
            self.zeros = mx.zeros(self.scales.shape, mx.uint8)
        assert layout.table is not None
        self._table = mx.array(values_of_bytes(layout.table, self.bits))
        self.freeze()

    def values(self, experts: mx.array | None = None) -> mx.array:
        """The weight [.., O, I], or [M, O, I] of the ``experts`` [M], computed in the dtype of the scales."""
        weight, scales, zeros = (self.get(name) for name in ("weight", "scales", "zeros"))
        if experts is not None:
            weight, scales, zeros = (None if part is None else part[experts] for part in (weight, scales, zeros))
        values = self._table.astype(scales.dtype)[weight].reshape(*scales.shape, self.group_size)
        if zeros is not None:  # exact: whole numbers up to 255
            values = values - zeros[..., None].astype(scales.dtype)
        return (values * scales[..., None]).reshape(*scales.shape[:-1], -1)


class LookupLinear(Lookup):
    """A linear layer [O, I] with a table."""

    def __call__(self, x: mx.array) -> mx.array:
        # The checkpoint dequantizes again in the backward pass: otherwise training would hold all layers dequantized.
        return mx.checkpoint(lambda x: x @ self.values().T)(self.sorted(x))


class LookupExperts(Lookup):
    """The stacked weights [E, O, I] of all experts with a table. Few rows dequantize only the chosen experts."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Rows [..., 1, I] to [..., 1, O], each through the expert given by ``indices`` [...]."""
        x, chosen = self.sorted(x, indices), None
        if indices.size <= len(self.weight):
            chosen, indices = indices.flatten(), mx.arange(indices.size).reshape(indices.shape)

        def product(x: mx.array) -> mx.array:
            weight = self.values(chosen).swapaxes(-1, -2)
            if mx.default_device() == mx.cpu:  # where gather_mm supports only float32
                wide = mx.gather_mm(x.astype(mx.float32), weight.astype(mx.float32), rhs_indices=indices)
                return wide.astype(x.dtype)
            return mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=sorted_indices)

        return mx.checkpoint(product)(x)


def quantized_layer(layout: Layout, shape: tuple[int, ...]) -> nn.Module:
    """The layer for a ``layout`` that MLX's own quantized layers do not have, whose arrays are still to be loaded.

    Arguments:
        layout: has act-order or a table.
        shape: of the weight, [O, I], or [E, O, I] of experts.
    """
    *experts, out, width = shape
    if layout.table is not None:
        return (LookupExperts if experts else LookupLinear)(shape, layout)
    how: dict[str, Any] = {"bias": False, "group_size": layout.group_size, "bits": layout.bits}
    return ReorderedExperts(width, out, *experts, **how) if experts else ReorderedLinear(width, out, **how)
