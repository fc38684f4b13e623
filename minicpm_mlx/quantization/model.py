"""Quantize a model, or give it the layers for the weights of a quantized checkpoint."""

from collections.abc import Mapping

import mlx.nn as nn
from mlx.utils import tree_unflatten

from minicpm_mlx.model import Model
from minicpm_mlx.quantization.packed import quantized_layer
from weights_io.adapters import target_parameters
from weights_io.casting import check_bits, check_groups, group_of
from weights_io.checkpoint import Checkpoint
from weights_io.config import ModelConfig
from weights_io.parameters import EMBEDDING, head_parameter, parameters
from weights_io.quantization.affine import Layout, layout_of_all


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


def packed_layouts(checkpoint: Checkpoint) -> dict[str, Layout]:
    """The matrices of a checkpoint that the model keeps quantized as they are: name of the MLX tensor -> layout.

    The experts of a layer are stacked, so they need one layout. An embedding is kept in MLX's and GGUF's formats, which
    alone quantize it, where MLX has such an embedding.
    """
    found: dict[str, Layout] = {}
    for parameter in parameters(checkpoint.config):
        for name, tensors in parameter.mlx_names(checkpoint.config).items():
            layout = layout_of_all(checkpoint.tensors[tensor] for tensor in tensors)
            special = layout is not None and (layout.reordered or layout.table is not None)
            if layout is not None and not (parameter is EMBEDDING and special):
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

    special = {name: x for name, x in layouts.items() if x.reordered or x.table is not None}

    def how(name: str, layer: nn.Module) -> bool | dict[str, int]:
        layout = None if f"{name}.weight" in special else layouts.get(f"{name}.weight")
        return layout is not None and {"group_size": layout.group_size, "bits": layout.bits}

    nn.quantize(model, class_predicate=how)
    shapes = {f"{name}.weight": x.weight.shape for name, x in model.named_modules() if f"{name}.weight" in special}
    replaced = [(name.removesuffix(".weight"), quantized_layer(x, shapes[name])) for name, x in special.items()]
    model.update_modules(tree_unflatten(replaced))
    return model
