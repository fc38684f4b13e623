"""Reading an adapter, for the PEFT and the mlx_lm format: tensors checked against the model, and config values."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weights_io.casting import check_finite
from weights_io.config import MAX_COUNT, ModelConfig, shown
from weights_io.config_keys import LARGEST
from weights_io.errors import InputError, short
from weights_io.files.tensor import LazyTensor, located
from weights_io.lora import Adapter, AdapterConfig, LoRAMatrices
from weights_io.parameters import Parameter, modules, short_name

RANK = "r"  # in an expected shape: the adapter's rank, which may be any
Shape = tuple[int | str, ...]


@dataclass
class AdapterReader:
    """Collects the arrays of an adapter by module, and checks that they are complete."""

    source: str  # the adapter's folder, for messages
    parts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # module -> {"a", "b", "magnitude"}

    def add(self, module: str, part: str, array: np.ndarray) -> None:
        parts = self.parts.setdefault(module, {})
        if part in parts:
            raise InputError(f"{self.source} has two tensors for the {part} of {module}; save the adapter again.")
        parts[part] = array

    def adapter(self, config: AdapterConfig, model: ModelConfig, scale: Callable[[str], float]) -> Adapter:
        """The adapter, its modules in table order.

        Arguments:
            config: its hyperparameters.
            model: the config of its model.
            scale: module name -> factor on B A.

        Raises:
            InputError: a module lacks an array, the ranks of A and B differ, or a scale is not positive.
        """
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
    """A tensor of an adapter as float32. Raises `InputError` for another shape, another kind of dtype, NaN or
    infinity."""
    fits = len(tensor.shape) == len(shape) and all(
        n == wanted or (wanted == RANK and n > 0) for n, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"{located(name, tensor)} has shape {shape_text(tensor.shape)} and the model expects {shape_text(shape)}; "
            "use the adapter with the model that it was trained on."
        )
    if tensor.dtype.kind not in "fV":  # bfloat16 is of kind V
        raise InputError(f"{located(name, tensor)} has dtype {tensor.dtype}; save the adapter in floats, unquantized.")
    values = tensor.read()
    check_finite(located(name, tensor), values)
    return np.ascontiguousarray(values, np.float32)


def table_parameter(name: str, tensor: LazyTensor, module: str, table: Mapping[str, Parameter]) -> Parameter:
    """The row of the parameter table for ``module``. Raises `InputError` for a module that takes no adapter."""
    if module in table:
        return table[module]
    raise InputError(
        f"{located(name, tensor)} is for {short(module)}, which is not a matrix of the model's layers; use the adapter "
        "with the model that it was trained on."
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
    """A string of the config that is only a note, such as the base model's name."""
    if not isinstance(raw.get(key), str | None):
        raise InputError(f"{source} has {key} {shown(raw[key])}; it must be a name.")
    return raw.get(key)


def check_booleans(raw: Mapping[str, Any], keys: Iterable[str], source: str) -> None:
    """Raises `InputError` where the value of one of these keys is not true, false or null."""
    for key in keys:
        if not isinstance(raw.get(key), bool | None):
            raise InputError(f"{source} has {key} {shown(raw[key])}; it must be true or false.")


def shape_text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
