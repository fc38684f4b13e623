"""Quantized layers, for weights that are quantized here and for those of a quantized checkpoint: MLX's affine groups
with a scale and a bias."""

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from minicpm_mlx.model import Model
from weights_io.adapters import target_parameters
from weights_io.casting import check_bits, check_groups, group_of
from weights_io.checkpoint import Checkpoint
from weights_io.config import ModelConfig
from weights_io.parameters import head_parameter, parameters
from weights_io.quantization.affine import Layout, layout_of


def quantize_model(model: Model, bits: int, head: bool = False) -> Model:
    """Quantize the matrices of the model's layers, except the router, to ``bits`` bits, in place; returns the model.

    ``head``: also quantize the head to 8 bits, and with it a tied embedding. This is for generation, where every
    step reads the whole head.
    """
    table = "model.embed_tokens" if model.lm_head is None else "lm_head"
    names = {table: 8} if head else {}
    check_bits(bits)
    for parameter in target_parameters(model.config, ("all-linear",)):
        check_groups(parameter.name, parameter.tensor_shape(model.config)[-1])
        names |= {name.removesuffix(".weight"): bits for name in parameter.mlx_names(model.config)}

    def how(name: str, layer: nn.Module) -> bool | dict[str, int]:
        return name in names and {"group_size": group_of(layer.weight.shape[-1]), "bits": names[name]}

    nn.quantize(model, class_predicate=how)
    return model


class ReorderedLinear(nn.QuantizedLinear):
    """A quantized layer whose groups consist of any inputs (GPTQ's act-order): it reorders its input first."""

    def set_order(self, order: np.ndarray) -> None:
        """Set the permutation [I] that sorts the inputs by group."""
        self._order, self._inverse = mx.array(order.astype(np.int32)), mx.array(np.argsort(order).astype(np.int32))

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(mx.take(x, self._order, axis=-1))

    def in_order(self, weight: mx.array) -> mx.array:
        """A weight [O, I] with its inputs in the order of the checkpoint."""
        return mx.take(weight, self._inverse, axis=-1)


def packed_layouts(checkpoint: Checkpoint) -> dict[str, Layout]:
    """The matrices of a checkpoint that the model keeps quantized as they are: name of the MLX tensor -> layout.

    The experts of a layer are stacked, so they need one layout and inputs in order.
    """
    found: dict[str, Layout] = {}
    for parameter in parameters(checkpoint.config):
        for name, tensors in parameter.mlx_names(checkpoint.config).items():
            layouts = {layout_of(checkpoint.tensors[tensor]) for tensor in tensors}
            layout = layouts.pop()
            if layout is not None and not layouts and not (layout.reordered and parameter.per_expert):
                found[name] = layout
    return found


def head_layout(config: ModelConfig) -> dict[str, Layout]:
    """The layout of a head in 8 bits, by the name of the MLX tensor: that of the embedding if it is tied."""
    parameter = head_parameter(config)
    layout = Layout(8, group_of(parameter.tensor_shape(config)[-1]), False)
    return dict.fromkeys(parameter.mlx_names(config), layout)


def with_layouts(model: Model, layouts: Mapping[str, Layout]) -> Model:
    """Replace the layers of `packed_layouts` by quantized ones, in place, whose arrays are still to be loaded; returns
    the model."""

    def how(name: str, layer: nn.Module) -> bool | dict[str, int]:
        layout = layouts.get(f"{name}.weight")
        return layout is not None and {"group_size": layout.group_size, "bits": layout.bits}

    nn.quantize(model, class_predicate=how)
    reordered = []
    for name, layer in model.named_modules():
        if (layout := layouts.get(f"{name}.weight")) is not None and layout.reordered:
            out, inputs = layer.scales.shape[0], layer.scales.shape[1] * layout.group_size
            reordered.append((name, ReorderedLinear(inputs, out, False, layout.group_size, layout.bits)))
    model.update_modules(tree_unflatten(reordered))
    return model
