"""What both forms of adapters share: tensors, each checked against the model's table as it is read, and numbers."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weights_io.casting import check_finite
from weights_io.config import LARGEST, MAX_COUNT, ModelConfig, shown
from weights_io.errors import InputError, short
from weights_io.files.tensor import LazyTensor, located
from weights_io.lora import Adapter, AdapterConfig, LoRAMatrices
from weights_io.parameters import Parameter, modules, short_name

RANK = "r"  # stands in a shape for what the adapter chooses
Shape = tuple[int | str, ...]


@dataclass
class AdapterReader:
    """The parts of an adapter by module, as they come in."""

    source: str  # for messages
    parts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # module -> a | b | magnitude

    def add(self, module: str, part: str, array: np.ndarray) -> None:
        parts = self.parts.setdefault(module, {})
        if part in parts:
            raise InputError(f"{self.source} has two tensors for the {part} of {module}; save the adapter again.")
        parts[part] = array

    def adapter(self, config: AdapterConfig, model: ModelConfig, scale: Callable[[str], float]) -> Adapter:
        """All of them, in table order. ``scale``: of a module. `InputError` where a part is missing."""
        if not self.parts:
            raise InputError(f"{self.source} holds no tensors; save the adapter again.")
        wanted = ("a", "b", "magnitude") if config.dora else ("a", "b")
        for module, parts in self.parts.items():
            missing = [part for part in wanted if part not in parts]
            if missing or len(parts) > len(wanted):
                fault = f"lacks the {missing[0]} of" if missing else "has a magnitude, as only DoRA has, for"
                raise InputError(f"{self.source} {fault} {module}; save its config and its tensors together.")
            if len(parts["a"]) != parts["b"].shape[1]:
                raise InputError(
                    f"{self.source} has rank {len(parts['a'])} and {parts['b'].shape[1]} in the two matrices of "
                    f"{module}; save the adapter again."
                )
            if not 0 < scale(module) < math.inf:
                raise InputError(f"{self.source} scales {module} by {scale(module)}; alpha must be a positive number.")
        order = [module for module in modules(model) if module in self.parts]
        return Adapter(config, {module: LoRAMatrices(**self.parts[module], scale=scale(module)) for module in order})

    def ranks(self) -> dict[str, int]:
        return {module: len(parts["a"]) for module, parts in self.parts.items() if "a" in parts}

    def targets(self, model: ModelConfig) -> tuple[str, ...]:
        table = modules(model)
        return tuple(dict.fromkeys(short_name(table[module]) for module in table if module in self.parts))


def read_part(name: str, tensor: LazyTensor, shape: Shape) -> np.ndarray:
    """The tensor as float32. `InputError` where it is not of ``shape``, not of floats, or not finite."""
    fits = len(tensor.shape) == len(shape) and all(
        n == wanted or (wanted == RANK and n > 0) for n, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"{located(name, tensor)} is {shape_text(tensor.shape)}, and the model has room for {shape_text(shape)} "
            "there; take the adapter with the model that it was trained on."
        )
    if tensor.dtype.kind not in "fV":  # bfloat16 is of kind V
        raise InputError(f"{located(name, tensor)} is of {tensor.dtype}, not of floats; save the adapter unquantized.")
    values = tensor.read()
    check_finite(located(name, tensor), values)
    return np.ascontiguousarray(values, np.float32)


def table_parameter(name: str, tensor: LazyTensor, module: str, table: Mapping[str, Parameter]) -> Parameter:
    """What ``module`` is in the model; `InputError` where an adapter cannot be on it."""
    if module in table:
        return table[module]
    raise InputError(
        f"{located(name, tensor)} is for {short(module)}, which is none of the matrices of the layers, and an adapter "
        "can change these alone; take the adapter with the model that it was trained on."
    )


def read_number(raw: Mapping[str, Any], key: str, default: float, source: str) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > LARGEST:
        raise InputError(f"{source} has {short(key)} {shown(value)}; it must be a number that float32 holds.")
    return value


def read_whole(raw: Mapping[str, Any], key: str, default: int, source: str) -> int:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
        raise InputError(f"{source} has {key} {shown(value)}; it must be a positive whole number.")
    return value


def read_note(raw: Mapping[str, Any], key: str, source: str) -> str | None:
    """A name that the config tells for the reader."""
    if not isinstance(raw.get(key), str | None):
        raise InputError(f"{source} has {key} {shown(raw[key])}; it must be a name.")
    return raw.get(key)


def check_booleans(raw: Mapping[str, Any], keys: Iterable[str], source: str) -> None:
    """`InputError` where one of the keys is there and is neither true nor false (nor null)."""
    for key in keys:
        if not isinstance(raw.get(key), bool | None):
            raise InputError(f"{source} has {key} {shown(raw[key])}; it must be true or false.")


def shape_text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
