"""Quantization of frozen weights to 8 or 4 bits, in groups that share a scale."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from minicpm_jax.model import get_layer
from minicpm_jax.quantization.packed import QuantizedWeight, in_tiles, order_dtype, quantize_embedding, quantize_weight
from weights_io.adapters import target_parameters
from weights_io.casting import check_bits, check_groups, group_of
from weights_io.config import ModelConfig
from weights_io.parameters import head_parameter
from weights_io.quantization.released import ReleasedForm

if TYPE_CHECKING:
    from minicpm_jax.model import Model


def packing(config: ModelConfig, bits: int, head: bool = False) -> dict[str, Callable[[Array], Any]]:
    """The functions that quantize weights to ``bits`` bits, by parameter name: for the layers' matrices except the
    router. Each function consumes (deletes) its argument.

    ``head``: also quantize the head to int8, and with it a tied embedding. This is for generation, where every step
    reads the whole head.
    """
    bits, pack = check_bits(bits), jax.jit(quantize_weight, static_argnums=(1, 2))

    def packed(name: str, width: int, weight: Array) -> QuantizedWeight:
        check_groups(name, width)
        return pack(weight, bits, group_of(math.gcd(width, weight.shape[-1])))  # a mesh may have padded the rows

    found: dict[str, Callable[[Array], Any]] = {}
    for parameter in target_parameters(config, ("all-linear",)):
        name, width = parameter.name, parameter.tensor_shape(config)[-1]
        found[name] = functools.partial(_consuming, functools.partial(packed, name, width))
    return found | (head_packing(config) if head else {})


def head_packing(config: ModelConfig) -> dict[str, Callable[[Array], Any]]:
    """The function of `packing` that quantizes the head, by parameter name: that of the embedding if it is tied."""
    return {head_parameter(config).name: functools.partial(_consuming, jax.jit(quantize_embedding))}


def _consuming(pack: Callable[[Array], Any], weight: Array) -> Any:
    packed = pack(weight)
    if isinstance(weight, jax.core.Tracer):
        return packed
    jax.block_until_ready(packed)
    weight.delete()
    return packed


def quantize_model(model: "Model", bits: int, head: bool = False) -> "Model":
    """The model with the weights of `packing` quantized. The arrays of ``model`` are consumed."""
    model = jax.tree.map(lambda x: x, model)
    for name, pack in packing(model.config, bits, head).items():
        layer = get_layer(model, name)
        layer.weight = pack(layer.weight[...])
    return model


def released_model(model: "Model", form: ReleasedForm | None, head: bool = False) -> "Model":
    """The model with zeros in place of the layers' matrices, quantized in the ``form`` of a released file (None: not
    quantized), to trace programs. ``head``: also quantize the head to int8."""
    model = jax.tree.map(lambda x: x, model)
    for parameter in target_parameters(model.config, ("all-linear",)):
        layer = get_layer(model, parameter.name)
        layer.weight = layer.weight if form is None else _zeros(form, layer.weight)
    for name, pack in head_packing(model.config).items() if head else ():
        layer = get_layer(model, name)
        layer.weight = pack(layer.weight[...])
    return model


def _zeros(form: ReleasedForm, weight: Any) -> QuantizedWeight:
    """A weight of the shape of ``weight`` in a form."""
    (*stack, out, width), dtype = weight.shape, weight.dtype
    group = width if form.group is None else math.gcd(form.group, width)
    of_groups, kind = (*stack, width // group, out), jnp.int4 if form.bits == 4 else jnp.int8
    return QuantizedWeight(
        jnp.zeros((*stack, width, out), kind),
        jnp.zeros(of_groups, dtype),
        dtype,
        zeros=jnp.zeros(of_groups, kind) if "zeros" in form.parts else None,
        biases=jnp.zeros(of_groups, dtype) if "biases" in form.parts else None,
        order=jnp.zeros((*stack, width), order_dtype(width)) if "order" in form.parts else None,
    )


def in_tiles_model(model: "Model") -> "Model":
    """The model with its quantized weights `in_tiles`."""
    model = jax.tree.map(lambda x: x, model)
    for parameter in target_parameters(model.config, ("all-linear",)):
        layer = get_layer(model, parameter.name)
        layer.weight = in_tiles(layer.weight)
    return model


def axes_of(path: Any, axes: tuple[str, ...], ndim: int) -> tuple[str, ...]:
    """Logical axes of the leaf at ``path`` of a weight with logical ``axes``, quantized or not."""
    names = set(names_of(path))
    if {"qweight", "scales", "zeros", "biases"} & names:  # transposed
        return (*axes[:-2], axes[-1], axes[-2])
    if "table" in names and ndim < len(axes):  # of a `TableWeight`: a copy on every device
        return (*axes[:-2], "norm")
    return (*axes[:-2], axes[-1]) if "order" in names else axes[:ndim]  # a head has one scale per row


def names_of(path: Any) -> list[str]:
    """The names, or indices, along a ``path`` of `jax.tree_util`."""
    return [str(getattr(key, "name", getattr(key, "key", key))) for key in path]
