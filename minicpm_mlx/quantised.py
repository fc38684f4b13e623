"""Weights in 8 or 4 bits, for a base that is not trained: MLX's affine groups of numbers that share scale and bias."""

import mlx.nn as nn

from minicpm_mlx.model import Model
from weights_io.adapters import target_parameters
from weights_io.casting import check_bits
from weights_io.errors import InputError

GROUPS = (64, 32)  # numbers of a row that share a scale: the first that divides the row


def quantised(model: Model, bits: int, head: bool = False) -> Model:
    """The model itself, with the matrices of its layers, but a router, in ``bits`` bits. ``head``: the head in 8, too,
    and with it an embedding that is the same table. For generation: a step reads the head whole."""
    table = "model.embed_tokens" if model.lm_head is None else "lm_head"
    names = {table: 8} if head else {}
    check_bits(bits)
    for parameter in target_parameters(model.config, ("all-linear",)):
        width = parameter.tensor_shape(model.config)[-1]
        if width % GROUPS[-1]:
            raise InputError(f"rows of {width} in {parameter.name} have no groups of 32; leave out --quantize.")
        names |= {name.removesuffix(".weight"): bits for name in parameter.layers(model.config)}

    def how(name: str, layer: nn.Module) -> bool | dict[str, int]:
        if name not in names:
            return False
        width = layer.weight.shape[-1]
        return {"group_size": next(g for g in GROUPS if width % g == 0), "bits": names[name]}

    nn.quantize(model, class_predicate=how)
    return model
