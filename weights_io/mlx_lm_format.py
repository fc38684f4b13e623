"""Adapters as mlx_lm writes them: adapters.safetensors beside adapter_config.json.

Layout (mlx_lm 0.32, tuner/lora.py and dora.py): lora_a [I, r], lora_b [r, O], DoRA's m [O], by module name; of experts
lora_a [E, r, I], lora_b [E, O, r]. One rank and one scale serve them all.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from weights_io.adapter_tensors import RANK, Found, Shape, read_part, row_of_the_table
from weights_io.config import ModelConfig, shown
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed
from weights_io.files.tensor import LazyTensor, located
from weights_io.lora import Adapter, AdapterConfig, by_layer, module_name, modules
from weights_io.parameters import parameters

WEIGHTS = ("adapters.safetensors",)
PARTS = {"lora_a": "a", "lora_b": "b", "m": "magnitude"}
NAME = re.compile(rf"(.+)\.({'|'.join(PARTS)})")
LAYER = "model.layers."


def is_config(raw: Mapping[str, Any]) -> bool:
    return "lora_parameters" in raw or "fine_tune_type" in raw


def read(raw: Mapping[str, Any], tensors: Mapping[str, LazyTensor], model: ModelConfig, source: str) -> Adapter:
    """``raw``: adapter_config.json; ``source``: how messages call the adapter. Raises `InputError`, see
    `weights_io.adapters.read_adapter`."""
    kind, numbers = raw.get("fine_tune_type", "lora"), raw.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise InputError(f"{source} is of fine_tune_type {shown(kind)}; only lora and dora are adapters.")
    if not isinstance(numbers, dict) or not isinstance(numbers.get("scale"), int | float):
        raise InputError(f"{source} has no lora_parameters with a scale; save the adapter again with its config.")
    table = {module_name(name): p for p in modules(model).values() for name in p.layers(model)}
    found = Found(source)
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise InputError(f"{located(name, tensor)} is no matrix of a LoRA; take a folder that mlx_lm.lora wrote.")
        module, part = match[1], PARTS[match[2]]
        parameter = row_of_the_table(name, tensor, module, table)
        rows, columns = parameter.tensor_shape(model)
        shapes: dict[str, Shape] = {"a": (columns, RANK), "b": (RANK, rows), "magnitude": (rows,)}
        if parameter.of_expert:
            experts = model.num_experts
            shapes = {"a": (experts, RANK, columns), "b": (experts, rows, RANK), "magnitude": (experts, rows)}
        values = read_part(name, tensor, shapes[part])
        each = values if parameter.of_expert else [np.ascontiguousarray(values.T)]
        for tensor_name, array in zip(parameter.layers(model)[f"{module}.weight"], each, strict=True):
            found.add(module_name(tensor_name), part, array)
    scale, rank = float(numbers["scale"]), max(found.ranks().values(), default=1)
    config = AdapterConfig(
        rank=rank,
        alpha=scale * rank,
        dropout=numbers.get("dropout") or 0.0,
        dora=kind == "dora",
        targets=found.targets(model),
        base_model=raw.get("model"),
    )
    return found.adapter(config, model, lambda module: scale)


def files(adapter: Adapter, model: ModelConfig, base_model: str | None) -> tuple[dict[str, Any], dict[str, Computed]]:
    """adapter_config.json and the tensors of the weights' file, with which ``mlx_lm.load(adapter_path=)`` opens it."""
    config = adapter.config
    targets = [p for p in parameters(model) if any(module_name(t) in adapter.tensors for t in p.tensors(model))]
    tensors: dict[str, np.ndarray] = {}
    for parameter in targets:
        if parameter.of_expert and config.dora:
            raise InputError("mlx_lm has no DoRA of experts; write the adapter in PEFT's form.")
        for module, (a, b, magnitude) in by_layer(parameter, adapter, model).items():
            tensors[f"{module}.lora_a"] = a if parameter.of_expert else a.T
            tensors[f"{module}.lora_b"] = b if parameter.of_expert else b.T
            if magnitude is not None:
                tensors[f"{module}.m"] = magnitude
    first = min(int(module.split(".")[2]) for module in adapter.tensors)
    raw = {
        "fine_tune_type": "dora" if config.dora else "lora",
        "model": base_model,
        "num_layers": model.num_hidden_layers - first,  # the last ones; those without tensors change nothing
        "lora_parameters": {
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
            "keys": [module_name(p.name).removeprefix(LAYER) for p in targets],
        },
    }
    return raw, {name: Computed.of(array) for name, array in tensors.items()}
