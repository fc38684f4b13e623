"""LoRA (arXiv 2106.09685) and DoRA (2402.09353) on the linear layers of a model.

Dims: L layers, E experts (leading axes, where a layer or an expert has one), O out, I in, R rank.

The trained parameters are a plain dictionary, parameter name -> {"a", "b"[, "magnitude"]}, in float32 for any dtype
of the model. `attach` returns a model that uses them; the base's weights are not changed.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from minicpm_data.generation.adapters import AdapterArrays
from minicpm_jax.layers.lora import LoRALayer, LoRAParams, _row_squares, ratio
from minicpm_jax.layers.row_lora import RowLoRALayer
from minicpm_jax.model import get_layer
from minicpm_jax.parallel.processes import fetch
from minicpm_jax.parallel.sharding import pad_or_trim
from weights_io.adapters import Adapter, AdapterConfig, stack_adapter, target_parameters, unstack_adapter
from weights_io.config import ModelConfig

if TYPE_CHECKING:
    from minicpm_jax.model import Model


def init_lora_params(
    model: "Model", config: AdapterConfig, layers: Collection[int], key: Array
) -> dict[str, LoRAParams]:
    """Initial parameters: A ~ Normal(0, 1 / R) as peft's "gaussian", B = 0, DoRA's magnitudes are the norms of W.
    Outside of ``layers`` A is 0 too, so those layers learn nothing."""
    chosen = jnp.zeros(model.config.num_hidden_layers).at[jnp.array(sorted(layers))].set(1)
    weights = {}
    for index, parameter in enumerate(target_parameters(model.config, config.targets)):
        *stack, out, width = parameter.shape(model.config)
        subkey = jax.random.fold_in(key, index)
        a = jax.random.normal(subkey, (*stack, config.rank, width)) / config.rank
        a = a * chosen.reshape(-1, *(1,) * (a.ndim - 1))
        params = {"a": a, "b": jnp.zeros((*stack, out, config.rank))}
        if config.dora:
            squares = jax.jit(_row_squares)(get_layer(model, parameter.name).weight)
            params["magnitude"] = jnp.sqrt(squares[..., :out])
        weights[parameter.name] = params
    return weights


def attach(
    model: "Model", weights: dict[str, LoRAParams], scale: float, dropout: float = 0.0, key: Array | None = None
) -> "Model":
    """The model with adapters. ``key``: apply ``dropout`` to the adapters' inputs, with a different mask for each
    key."""
    model = jax.tree.map(lambda x: x, model)
    for index, (name, params) in enumerate(sorted(weights.items())):
        layer = get_layer(model, name)
        out, width = layer.weight.shape[-2:]
        given = {"a": _pad_like_weight(params["a"], -1, width), "b": _pad_like_weight(params["b"], -2, out)}
        if "magnitude" in params:
            given["ratio"] = _pad_like_weight(ratio(layer.weight, params, scale), -1, out)
        if key is not None and dropout:
            given["key"] = jax.random.split(jax.random.fold_in(key, index), len(params["a"]))
        layer.adapter = nnx.data(LoRALayer(given, scale, dropout, params["a"].shape[-1]))
    return model


def attach_rows(model: "Model", names: tuple[str, ...], arrays: AdapterArrays) -> "Model":
    """The model with several adapters, of which each row of a batch has one (`layers.row_lora`)."""
    model = jax.tree.map(lambda x: x, model)
    place = None if model.mesh is None else NamedSharding(model.mesh, PartitionSpec())
    for name, (a, b) in arrays.items():
        layer = get_layer(model, name)
        out, width = layer.weight.shape[-2:]
        parts = _pad_like_weight(jnp.asarray(a), -1, width), _pad_like_weight(jnp.asarray(b), -2, out)
        layer.adapter = nnx.data(
            RowLoRALayer(*(part if place is None else jax.device_put(part, place) for part in parts))
        )
    model.adapters = names
    return model


def _pad_like_weight(x: Array, axis: int, size: int) -> Array:
    """Pad an axis like `sharding.pad_config` pads the adapted weight."""
    shape = list(x.shape)
    shape[axis] = size
    return pad_or_trim(x, tuple(shape))


def from_adapter(config: ModelConfig, adapter: Adapter) -> dict[str, LoRAParams]:
    """The parameters of an adapter file. A layer without an adapter gets zeros, also as its magnitude (see `ratio`)."""
    weights = {}
    for parameter in target_parameters(config, adapter.config.targets):
        norms = dict.fromkeys(parameter.hf_names(config), np.zeros(parameter.tensor_shape(config)[0], np.float32))
        a, b, magnitude = stack_adapter(parameter, adapter, config, norms.__getitem__)
        weights[parameter.name] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
        if magnitude is not None:
            weights[parameter.name]["magnitude"] = jnp.asarray(magnitude)
    return weights


def to_adapter(
    config: ModelConfig, weights: dict[str, LoRAParams], adapter: AdapterConfig, layers: Collection[int]
) -> Adapter:
    """The adapter to save, for the ``layers`` that have one."""

    def parts(params: LoRAParams) -> tuple[Any, ...]:
        return tuple(None if part not in params else fetch(params[part]) for part in ("a", "b", "magnitude"))

    arrays: Any = {name: parts(params) for name, params in weights.items()}
    return unstack_adapter(adapter, arrays, config, layers)
