"""The adapter format of mlx_lm: adapters.safetensors beside adapter_config.json.

Layout (mlx_lm 0.32, tuner/lora.py and dora.py), by module name: lora_a [I, r], lora_b [r, O], DoRA's m [O]. Experts
have lora_a [E, r, I] and lora_b [E, O, r]. All modules share one rank and one scale.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from weights_io.adapter_reader import (
    RANK,
    AdapterReader,
    Shape,
    check_booleans,
    read_note,
    read_number,
    read_part,
    read_whole,
    table_parameter,
)
from weights_io.config import ModelConfig, shown
from weights_io.errors import InputError, short
from weights_io.files.safetensors import Computed
from weights_io.files.tensor import LazyTensor, located
from weights_io.lora import Adapter, AdapterConfig, adapter_by_layer
from weights_io.parameters import LAYERS, layer_of, module_name, modules, parameters

WEIGHTS = ("adapters.safetensors",)
PARTS = {"lora_a": "a", "lora_b": "b", "m": "magnitude"}
NAME = re.compile(rf"(.+)\.({'|'.join(PARTS)})")
# Ignored keys: the training options of mlx_lm.lora, current and former. Any other unknown key is refused.
TRAINING = frozenset(
    """adapter_path batch_size clear_cache_threshold config data grad_accumulation_steps grad_checkpoint
    hf_dataset iters learning_rate lr_schedule mask_prompt max_seq_length optimizer optimizer_config project_name
    prompt_feature completion_feature report_to resume_adapter_file save_every seed steps_per_eval steps_per_report
    test test_batches train trust_remote_code val_batches wandb""".split()
)
UNDERSTOOD = frozenset({"fine_tune_type", "lora_parameters", "num_layers", "lora_layers", "use_dora", "model"})
NUMBERS = frozenset({"rank", "scale", "dropout", "keys"})


def is_config(raw: Mapping[str, Any]) -> bool:
    return "lora_parameters" in raw or "fine_tune_type" in raw


def read(raw: Mapping[str, Any], tensors: Mapping[str, LazyTensor], model: ModelConfig, source: str) -> Adapter:
    """Read an adapter; see `weights_io.adapters.read_adapter`.

    Arguments:
        raw: the contents of adapter_config.json.
        tensors: the tensors of the weights file.
        model: the config of its model.
        source: the adapter's name in messages.

    Raises:
        InputError: the adapter cannot be used.
    """
    kind = raw.get("fine_tune_type", "dora" if raw.get("use_dora") else "lora")  # the older key
    numbers = _numbers(raw, kind, source)
    table = {module_name(name): p for p in modules(model).values() for name in p.mlx_names(model)}
    found = AdapterReader(source)
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise InputError(f"{located(name, tensor)} is no matrix of a LoRA; take a folder that mlx_lm.lora wrote.")
        module, part = match[1], PARTS[match[2]]
        parameter = table_parameter(name, tensor, module, table)
        rows, columns = parameter.tensor_shape(model)
        shapes: dict[str, Shape] = {"a": (columns, RANK), "b": (RANK, rows), "magnitude": (rows,)}
        if parameter.per_expert:
            experts = model.num_experts
            shapes = {"a": (experts, RANK, columns), "b": (experts, rows, RANK), "magnitude": (experts, rows)}
        values = read_part(name, tensor, shapes[part])
        each = values if parameter.per_expert else [np.ascontiguousarray(values.T)]
        for tensor_name, array in zip(parameter.mlx_names(model)[f"{module}.weight"], each, strict=True):
            found.add(module_name(tensor_name), part, array)
    rank = max(found.ranks().values(), default=1)
    _check_modules(raw, numbers, found, model, source)
    scale = float(read_number(numbers, "scale", 0, source))
    config = AdapterConfig(
        rank=rank,
        alpha=scale * rank,
        dropout=0.0 if numbers.get("dropout") is None else read_number(numbers, "dropout", 0.0, source),
        dora=kind == "dora",
        targets=found.targets(model),
        base_model=read_note(raw, "model", source),
    )
    return found.adapter(config, model, lambda module: scale)


def _numbers(raw: Mapping[str, Any], kind: Any, source: str) -> dict[str, Any]:
    """The object ``lora_parameters``. Raises `InputError` for unknown keys in it or in the config."""
    numbers = raw.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise InputError(f"{source} is of fine_tune_type {shown(kind)}; only lora and dora are adapters.")
    check_booleans(raw, ("use_dora",), source)
    if raw.get("use_dora") is not None and raw["use_dora"] != (kind == "dora"):
        raise InputError(
            f"{source} has use_dora {shown(raw['use_dora'])} and fine_tune_type {shown(kind)}; correct one."
        )
    if not isinstance(numbers, dict) or numbers.get("scale") is None:
        raise InputError(f"{source} has no lora_parameters with a scale; save the adapter again with its config.")
    unknown = {key: raw[key] for key in raw.keys() - TRAINING - UNDERSTOOD}
    unknown |= {f"lora_parameters.{key}": numbers[key] for key in numbers.keys() - NUMBERS}
    if unknown.get("lora_parameters.alpha") is not None and unknown["lora_parameters.alpha"] == numbers.get("rank"):
        del unknown["lora_parameters.alpha"]  # a factor of alpha / rank, once
    for key, value in unknown.items():
        if value is not None:
            raise InputError(
                f"{source} has {short(key)} = {shown(value)}, which is not understood and may change the numbers; "
                "remove the key if it only tells how the adapter was trained."
            )
    return numbers


def _check_modules(
    raw: Mapping[str, Any], numbers: Mapping[str, Any], found: AdapterReader, model: ModelConfig, source: str
) -> None:
    """Check the tensors against the config. Raises `InputError`.

    mlx_lm creates adapters of the config's rank in the last ``num_layers`` layers (all layers if it is 0 or less), for
    the names in ``keys``, and refuses tensors for other modules.
    """
    layers = raw.get("num_layers", raw.get("lora_layers"))
    if layers is not None and type(layers) is not int:
        raise InputError(f"{source} has num_layers {shown(layers)}; it must be a whole number.")
    first = 0 if layers is None or layers <= 0 else max(0, model.num_hidden_layers - layers)
    keys = numbers.get("keys")
    if keys is not None and (not isinstance(keys, list) or not all(isinstance(key, str) for key in keys)):
        raise InputError(f"{source} has keys {shown(keys)}; it must be a list of names.")
    rank = None if numbers.get("rank") is None else read_whole(numbers, "rank", 1, source)
    for module, actual in found.ranks().items():
        _, _, name = module.removeprefix(LAYERS).partition(".")
        name = re.sub(r"experts\.\d+\.", "experts.", name)
        fault = f"num_layers {layers}" if layer_of(module) < first else None
        if keys is not None and not {name, module} & set(keys):
            fault = f"keys {shown(keys)}"
        if rank is not None and actual != rank:
            fault = f"rank {rank}, not {actual},"
        if fault:
            raise InputError(
                f"{source} has {fault} and yet tensors for {module}; save the adapter again, config and tensors "
                "together."
            )


def files(adapter: Adapter, model: ModelConfig, base_model: str | None) -> tuple[dict[str, Any], dict[str, Computed]]:
    """The adapter_config.json and the tensors that ``mlx_lm.load(adapter_path=)`` reads. Raises `InputError`."""
    config = adapter.config
    targets = [p for p in parameters(model) if any(module_name(t) in adapter.tensors for t in p.hf_names(model))]
    tensors: dict[str, np.ndarray] = {}
    for parameter in targets:
        if parameter.per_expert and config.dora:
            raise InputError("mlx_lm has no DoRA for experts; write the adapter in PEFT's format.")
        for module, (a, b, magnitude) in adapter_by_layer(parameter, adapter, model).items():
            tensors[f"{module}.lora_a"] = a if parameter.per_expert else a.T
            tensors[f"{module}.lora_b"] = b if parameter.per_expert else b.T
            if magnitude is not None:
                tensors[f"{module}.m"] = magnitude
    first = min(layer_of(module) for module in adapter.tensors)
    raw = {
        "fine_tune_type": "dora" if config.dora else "lora",
        "model": base_model,
        "num_layers": model.num_hidden_layers - first,  # the last ones; those without tensors change nothing
        "lora_parameters": {
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
            "keys": [module_name(p.name).removeprefix(LAYERS) for p in targets],
        },
    }
    return raw, {name: Computed.of(array) for name, array in tensors.items()}
