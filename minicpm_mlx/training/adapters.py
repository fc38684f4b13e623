"""LoRA (arXiv 2106.09685) and DoRA (2402.09353) on the linear layers of a model.

Dims: E experts (leading axis, where a layer's experts are stacked), O out, I in, R rank.

The trained parameters are a plain dictionary, layer name -> {"a", "b"[, "magnitude"]}, in float32 for any dtype of
the model. `attach` puts them into the model; the base's weights are not changed.
"""

from collections.abc import Collection

import mlx.core as mx
import numpy as np

from minicpm_data.generation.adapters import AdapterArrays
from minicpm_mlx.layers.lora import LoRALayer, LoRAParams, dense
from minicpm_mlx.layers.row_lora import RowLoRALayer
from minicpm_mlx.model import Model
from weights_io.adapters import Adapter, AdapterConfig, adapter_by_layer, adapter_from_layers, target_parameters
from weights_io.config import ModelConfig
from weights_io.parameters import module_name, parameters


def init_lora_params(
    model: Model, config: AdapterConfig, layers: Collection[int], key: mx.array
) -> dict[str, LoRAParams]:
    """Initial parameters for the targets in ``layers``: A ~ Normal(0, 1 / R) as peft's "gaussian", B = 0, DoRA's
    magnitudes are the norms of W."""
    found = dict(model.named_modules())
    names = [
        name.removesuffix(".weight")
        for parameter in target_parameters(model.config, config.targets)
        for index, name in enumerate(parameter.mlx_names(model.config))
        if index in layers
    ]
    weights = {}
    for name, subkey in zip(names, mx.random.split(key, len(names) + 1), strict=False):
        weight = dense(found[name])
        *stack, out, width = weight.shape
        params = {
            "a": mx.random.normal((*stack, config.rank, width), key=subkey) / config.rank,
            "b": mx.zeros((*stack, out, config.rank)),
        }
        if config.dora:
            params["magnitude"] = norms(weight)
        weights[name] = params
    return weights


def norms(weight: mx.array) -> mx.array:
    """Norms [.., O] of the rows of a weight [.., O, I], in float32."""
    return mx.sqrt((weight.astype(mx.float32) ** 2).sum(axis=-1))


def attach(model: Model, weights: dict[str, LoRAParams], scale: float, dropout: float = 0.0) -> Model:
    """Add adapters to the model, in place; only they are trainable. Returns the model."""
    model.freeze()
    found = dict(model.named_modules())
    for name, params in weights.items():
        parent, _, last = name.rpartition(".")
        base = found[name].base if isinstance(found[name], LoRALayer) else found[name]
        layer = LoRALayer(base, params, scale, dropout)
        layer.unfreeze(keys=list(params), recurse=False)
        setattr(found[parent], last, layer)
    return model


def attach_rows(model: Model, names: tuple[str, ...], arrays: AdapterArrays) -> Model:
    """Add several adapters, of which each row of a batch has one (`layers.row_lora`), in place. Returns the model."""
    found, table = dict(model.named_modules()), {p.name: p for p in parameters(model.config)}
    for parameter, (a, b) in arrays.items():
        for layer, weight in enumerate(table[parameter].mlx_names(model.config)):
            name = module_name(weight)
            parent, _, last = name.rpartition(".")
            setattr(found[parent], last, RowLoRALayer(found[name], mx.array(a[layer]), mx.array(b[layer])))
    model.adapters = names
    return model


def cache_dora_ratios(model: Model) -> Model:
    """Prepare the model for generation, in place: compute DoRA's ratios once instead of per token. Returns the
    model."""
    for _, layer in model.named_modules():
        if isinstance(layer, LoRALayer) and layer.magnitude is not None:
            layer._ratio = layer.ratio()
            mx.eval(layer._ratio)
    return model


def set_dropout_keys(model: Model, key: mx.array | None) -> None:
    """Give each adapter its own dropout key; None turns dropout off."""
    layers = [layer for _, layer in model.named_modules() if isinstance(layer, LoRALayer)]
    for index, layer in enumerate(layers):
        layer._key = None if key is None or not layer.dropout else mx.random.split(key, len(layers) + 1)[index]


def untrained(model: Model) -> dict[str, mx.array]:
    """The values, by parameter name, with which the model's adapters change nothing."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALayer):
            weights[f"{name}.b"] = mx.zeros_like(layer.b)
            if layer.magnitude is not None:
                weights[f"{name}.magnitude"] = norms(dense(layer.base))
    return weights


def lora_params(model: Model) -> dict[str, LoRAParams]:
    """The parameters of the model's adapters."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALayer)}
    return {name: dict(layer.trainable_parameters()) for name, layer in layers.items()}


def from_adapter(config: ModelConfig, adapter: Adapter) -> dict[str, LoRAParams]:
    """The parameters of an adapter file."""
    weights = {}
    for parameter in target_parameters(config, adapter.config.targets):
        for name, (a, b, magnitude) in adapter_by_layer(parameter, adapter, config).items():
            weights[name] = {"a": mx.array(a), "b": mx.array(b)}
            if magnitude is not None:
                weights[name]["magnitude"] = mx.array(magnitude)
    return weights


def to_adapter(config: ModelConfig, weights: dict[str, LoRAParams], adapter: AdapterConfig) -> Adapter:
    """The adapter to save."""
    arrays = {
        name: (np.array(m["a"]), np.array(m["b"]), np.array(m["magnitude"]) if "magnitude" in m else None)
        for name, m in weights.items()
    }
    return adapter_from_layers(adapter, arrays, config)
