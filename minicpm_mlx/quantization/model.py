"""Weights in 8 or 4 bits, for a base that is not trained: MLX's affine groups of numbers that share scale and bias."""

import mlx.nn as nn

from minicpm_mlx.model import Model
from weights_io.adapters import target_parameters
from weights_io.casting import check_bits, check_groups, group_of


def quantize_model(model: Model, bits: int, head: bool = False) -> Model:
    """The model itself, with the matrices of its layers, but a router, in ``bits`` bits. ``head``: the head in 8, too,
    and with it an embedding that is the same table. For generation: a step reads the head whole."""
    table = "model.embed_tokens" if model.lm_head is None else "lm_head"
    names = {table: 8} if head else {}
    check_bits(bits)
    for parameter in target_parameters(model.config, ("all-linear",)):
        check_groups(parameter.name, parameter.tensor_shape(model.config)[-1])
        names |= {name.removesuffix(".weight"): bits for name in parameter.layers(model.config)}

    def how(name: str, layer: nn.Module) -> bool | dict[str, int]:
        return name in names and {"group_size": group_of(layer.weight.shape[-1]), "bits": names[name]}

    nn.quantize(model, class_predicate=how)
    return model
