"""The adapter format of Hugging Face PEFT: adapter_model.safetensors (or .bin) beside adapter_config.json.

Layout, by module name with the prefix "base_model.model.": lora_A [r, I], lora_B [O, r], lora_magnitude_vector [O].
Meaning of the config keys: peft 0.21, tuners/lora/config.py.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

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
from weights_io.lora import Adapter, AdapterConfig
from weights_io.parameters import layer_of, modules, short_name
from weights_io.vision.names import file_name, table_name

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the best first
PREFIX = "base_model.model."
PARTS = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude"}
NAME = re.compile(rf"(?:{re.escape(PREFIX)})?(.+?)\.({'|'.join(PARTS)})(?:\.default)?(?:\.weight)?")
UNDERSTOOD = frozenset(
    """peft_type r lora_alpha lora_dropout bias use_rslora use_dora rank_pattern alpha_pattern layers_to_transform
    target_modules exclude_modules init_lora_weights base_model_name_or_path""".split()
)
BOOLEANS = tuple("use_rslora use_dora fan_in_fan_out inference_mode lora_bias use_qalora ensure_weight_tying".split())
# Keys that do not affect the result. Any other key with a value does.
IGNORED_KEYS = frozenset(
    """task_type auto_mapping peft_version revision inference_mode layers_pattern megatron_config
    megatron_core qalora_group_size loftq_config eva_config ensure_weight_tying""".split()
)
# Initializations that leave the base model unchanged. The others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) change it.
INITS = (True, False, None, "gaussian", "orthogonal", "eva")
# Patterns of the config are matched with Python's re, as in PEFT, which can take exponential time. Repeated groups are
# refused, and so are repetitions that could take more than MAX_STEPS steps on a module name.
REPEAT = re.compile(r"(?<![\\(])[*+{?]")
REPEATED_GROUP = re.compile(r"\)[*+{]")
NAME_LENGTH, MAX_STEPS, MAX_PATTERNS = 45, 100_000, 5000


def is_config(raw: Mapping[str, Any]) -> bool:
    return "peft_type" in raw


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
    _check(raw, source)
    table = modules(model)
    found = AdapterReader(source)
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise InputError(
                f"{located(name, tensor)} is no matrix of a LoRA on a linear layer; merge the adapter into its model "
                "with PEFT and load the result."
            )
        module, part = table_name(match[1], model), PARTS[match[2]]
        rows, columns = table_parameter(name, tensor, module, table).tensor_shape(model)
        shapes: dict[str, Shape] = {"a": (RANK, columns), "b": (rows, RANK), "magnitude": (rows,)}
        found.add(module, part, read_part(name, tensor, shapes[part]))
    rank, ranks = read_whole(raw, "r", 8, source), found.ranks()
    rank_of = _by_pattern(raw, "rank_pattern", rank, source)
    for module, actual in ranks.items():
        expected = rank_of(module)
        if actual != expected:
            raise InputError(
                f"{source} says rank {expected} for {module}, whose matrices have rank {actual}; save the adapter "
                "again, config and tensors together."
            )
    _check_targets(raw, [*ranks], model, source)
    root = raw.get("use_rslora") or False  # arXiv 2312.03732: alpha / sqrt(r)
    alpha = read_number(raw, "lora_alpha", 8, source)
    alpha_of = _by_pattern(raw, "alpha_pattern", alpha, source)

    def scale(module: str) -> float:
        return alpha_of(module) / (math.sqrt(ranks[module]) if root else ranks[module])

    largest = max(ranks.values(), default=rank)
    config = AdapterConfig(
        rank=largest,
        alpha=alpha / (math.sqrt(rank) if root else rank) * largest,
        dropout=read_number(raw, "lora_dropout", 0.0, source),
        dora=raw.get("use_dora") or False,
        targets=found.targets(model),
        base_model=read_note(raw, "base_model_name_or_path", source),
    )
    return found.adapter(config, model, scale)


def files(adapter: Adapter, model: ModelConfig, base_model: str | None) -> tuple[dict[str, Any], dict[str, Computed]]:
    """The adapter_config.json and the tensors that ``PeftModel.from_pretrained`` reads."""
    config = adapter.config
    own_rank = {module: len(m.a) for module, m in adapter.tensors.items()}
    own_alpha = {module: _plain(m.scale * len(m.a)) for module, m in adapter.tensors.items()}
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "use_dora": config.dora,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        **_targets(adapter, model),
        "rank_pattern": {module: r for module, r in own_rank.items() if r != config.rank},
        "alpha_pattern": {module: a for module, a in own_alpha.items() if a != _plain(config.alpha)},
    }
    tensors = {}
    for module, m in adapter.tensors.items():
        for part, array in (("lora_A.weight", m.a), ("lora_B.weight", m.b), ("lora_magnitude_vector", m.magnitude)):
            if array is not None:
                tensors[f"{PREFIX}{file_name(module, model)}.{part}"] = Computed.of(array)
    return raw, tensors


def _targets(adapter: Adapter, model: ModelConfig) -> dict[str, Any]:
    """The target keys of the config. PEFT creates an adapter wherever a name fits, so short names are used only where
    all adapted layers have the same modules; otherwise the full module names are listed."""
    table = modules(model)
    layers = sorted({layer_of(module) for module in adapter.tensors})
    names = sorted({short_name(table[module]) for module in adapter.tensors})
    fitting = {m for m, parameter in table.items() if short_name(parameter) in names and layer_of(m) in layers}
    if fitting != adapter.tensors.keys():
        return {"target_modules": list(adapter.tensors), "layers_to_transform": None, "layers_pattern": None}
    every = len(layers) == model.num_hidden_layers
    return {
        "target_modules": names,
        "layers_to_transform": None if every else layers,
        "layers_pattern": None if every else "layers",
    }


def _check(raw: Mapping[str, Any], source: str) -> None:
    """Raises `InputError` for settings that would change the result and are not supported."""
    check_booleans(raw, BOOLEANS, source)
    if raw["peft_type"] != "LORA":
        raise InputError(f"{source} is of peft_type {shown(raw['peft_type'])}; only LORA (with DoRA) is supported.")
    if raw.get("bias", "none") != "none":
        raise InputError(f"{source} has bias {shown(raw['bias'])}, and MiniCPM has no biases; train it without.")
    if raw.get("init_lora_weights", True) not in INITS:
        raise InputError(
            f"{source} has init_lora_weights {shown(raw['init_lora_weights'])}, which changed the base model too; save "
            "it with PEFT's path_initial_model_for_weight_conversion, or merged."
        )
    for key, value in raw.items():
        if key not in UNDERSTOOD | IGNORED_KEYS and value:
            raise InputError(
                f"{source} has {short(key)} = {shown(value)}, which may change the numbers and is not supported; merge "
                "the adapter into its model with PEFT and load the result."
            )


def _check_targets(raw: Mapping[str, Any], adapted: Sequence[str], model: ModelConfig, source: str) -> None:
    """The config must not leave out a module that has tensors: PEFT would pass over them."""
    layers = raw.get("layers_to_transform")
    chosen = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(layer) is int for layer in chosen):
        raise InputError(f"{source} has layers_to_transform {shown(layers)}; it must be a list of whole numbers.")
    targets = raw.get("target_modules")
    for module in adapted:
        stored = file_name(module, model)
        left_out = "layers_to_transform" if chosen and layer_of(module) not in chosen else None
        if targets is not None and targets != "all-linear" and not _named(raw, "target_modules", stored, source):
            left_out = left_out or "target_modules"
        if raw.get("exclude_modules") and _named(raw, "exclude_modules", stored, source):
            left_out = left_out or "exclude_modules"
        if left_out:
            raise InputError(
                f"{source} has {left_out} {shown(raw[left_out])} and yet tensors for {module}; save the adapter "
                "again, config and tensors together."
            )


def _named(raw: Mapping[str, Any], key: str, module: str, source: str) -> bool:
    """Whether a list of the ends of names, or a pattern, takes a module."""
    value = raw[key]
    if isinstance(value, str):
        _check_patterns((value,), key, source)
        return re.fullmatch(value, module) is not None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{source} has {key} {shown(value)}; it must be a list of names or one pattern.")
    return any(f".{module}".endswith(f".{name}") for name in value)


def _by_pattern(raw: Mapping[str, Any], key: str, default: float, source: str) -> Callable[[str], float]:
    """Of a module: the value of the first pattern that fits the end of its name, as PEFT looks it up."""
    patterns = raw.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{source} has {key} {shown(patterns)}; it must be an object of numbers by module name.")
    _check_patterns(patterns, key, source)
    numbers = {pattern: read_number(patterns, pattern, default, source) for pattern in patterns}
    known = [(re.compile(rf"(.*\.)?({pattern})$"), number) for pattern, number in numbers.items()]
    return lambda module: next((number for pattern, number in known if pattern.match(module)), default)


def _check_patterns(patterns: Collection[str], key: str, source: str) -> None:
    """`InputError` for a pattern that is none, or could take for ever."""
    if len(patterns) > MAX_PATTERNS:
        raise InputError(f"{source} has {len(patterns)} patterns in {key}, more than any model has modules.")
    steps = 0
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{source} has the pattern {shown(pattern)} in {key} ({error}); correct it.") from None
        repeats = len(REPEAT.findall(pattern))
        steps += NAME_LENGTH**repeats if repeats else 0
        if steps > MAX_STEPS or REPEATED_GROUP.search(pattern):
            raise InputError(
                f"{source} has the pattern {shown(pattern)} in {key}, which may take for ever; name the modules."
            )


def _plain(number: float) -> float:
    """32, not 32.0 (nor 31.999999999999996), as PEFT has it."""
    return round(number) if abs(number - round(number)) < 1e-9 else number
