"""Quantization of frozen weights to 8 or 4 bits: MLX's affine groups with a scale and a bias."""

import mlx.nn as nn

from minicpm_mlx.model import Model
from weights_io.adapters import target_parameters
from weights_io.casting import check_bits, check_groups, group_of


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
