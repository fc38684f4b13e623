"""Weights in 8 or 4 bits, for a base that is not trained: MLX's affine groups of numbers that share scale and bias."""

import mlx.nn as nn

from minicpm_mlx.model import Model
from weights_io.adapters import target_parameters
from weights_io.errors import InputError

GROUPS = (64, 32)  # numbers of a row that share a scale: the first that divides the row


def quantised(model: Model, bits: int) -> Model:
    """The model itself, with the matrices of its layers, but a router, in ``bits`` bits."""
    names = set()
    for parameter in target_parameters(model.config, ("all-linear",)):
        width = parameter.tensor_shape(model.config)[-1]
        if width % GROUPS[-1]:
            raise InputError(f"rows of {width} in {parameter.name} have no groups of 32; leave out --quantize.")
        names |= {name.removesuffix(".weight") for name in parameter.layers(model.config)}

    def how(name: str, layer: nn.Module) -> bool | dict[str, int]:
        if name not in names:
            return False
        width = layer.weight.shape[-1]
        return {"group_size": next(g for g in GROUPS if width % g == 0), "bits": bits}

    nn.quantize(model, class_predicate=how)
    return model
