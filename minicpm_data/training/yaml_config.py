"""The YAML file of ``--config``, in mlx_lm's form, as the flags that it stands for."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from minicpm_data.training.options import LoraOptions
from weights_io.command_line import former_names
from weights_io.errors import InputError, flag, short
from weights_io.files.regular import read_regular

SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}  # mlx_lm's names of ours
OF_ITS_MACHINE = ("clear_cache_threshold", "trust_remote_code")  # mlx_lm's; they change no number
OF_LORA = "lora_parameters: {rank, scale or alpha, dropout, keys}"


def flags_of_file(path: Path, options: type) -> list[str]:
    """The flags of a YAML file whose keys are the fields of ``options``, or mlx_lm's ``lora_parameters`` and
    ``lr_schedule``. Raises `InputError` for a file that is no such mapping, and for keys that are not known."""
    from minicpm_data.yaml_text import MAX_BYTES, load  # only where there is such a file

    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist.", option="config")
    found = load(read_regular(path, MAX_BYTES), f"--config {path}")
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold lines of the form `learning_rate: 1e-4`.", option="config")
    known = ({field.name for field in fields(options)} | former_names(options).keys()) - {"config"}
    flags: list[str] = []
    for name, value in _flat(found, path):
        if name not in known:
            raise InputError(
                f"{path} has {short(name)}, which is no option of this command (see --help).", option="config"
            )
        flags += _flag(name, value, path)
    return flags


def _flat(found: Mapping[Any, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """The options under our names; what mlx_lm nests is taken apart."""
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name == "lora_parameters" and value is not None:
            yield from _lora(value, path)
        elif name == "lr_schedule" and isinstance(value, dict):
            yield from _schedule(value, path)
        elif name == "optimizer_config":
            if value and not (isinstance(value, dict) and not any(value.values())):
                raise InputError(
                    f"{path} has an optimizer_config; the optimizers here have no further options.", option="config"
                )
        elif name not in OF_ITS_MACHINE:
            yield name, value


def _lora(given: Any, path: Path) -> Iterator[tuple[str, Any]]:
    if not isinstance(given, dict) or given.keys() - {"rank", "scale", "alpha", "dropout", "keys"}:
        raise InputError(f"{path} has lora_parameters of another form than {OF_LORA}.", option="config")
    rank, scale, keys = given.get("rank", LoraOptions.rank), given.get("scale"), given.get("keys")
    if scale is not None and not (isinstance(rank, int) and isinstance(scale, int | float)):
        raise InputError(f"{path} has lora_parameters whose rank or scale is no number.", option="config")
    yield from ((name, given.get(name)) for name in ("rank", "dropout", "alpha"))
    if scale is not None:
        yield "alpha", rank * scale
    if keys is not None:
        if not isinstance(keys, list) or not keys:
            raise InputError(f"{path} has lora_parameters whose keys are no list of names.", option="config")
        yield "targets", [str(key).rpartition(".")[2] for key in keys]  # self_attn.q_proj


def _schedule(given: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """mlx_lm's {name, warmup, warmup_init, arguments: [highest, steps, lowest]} (linear: [highest, lowest, steps]).
    Ours begins and ends at 0, and with the run: one that stays far above 0 is refused."""
    name, arguments = str(given.get("name")), given.get("arguments")
    known = name in SCHEDULES and not given.keys() - {"name", "warmup", "warmup_init", "arguments"}
    if not known or not isinstance(arguments, list) or not arguments:
        raise InputError(
            f"{path} has an lr_schedule that is not known; give lr_schedule: cosine, linear, constant or wsd, "
            "with learning_rate and warmup_steps.",
            option="config",
        )
    try:
        highest, *others = map(float, arguments)
        lowest = max([float(given.get("warmup_init", 0)), *others[1:]])
    except (TypeError, ValueError):
        raise InputError(f"{path} has an lr_schedule whose arguments are no numbers.", option="config") from None
    if name == "linear_schedule":  # mlx's is (first, last, steps)
        lowest = max([float(given.get("warmup_init", 0)), *others[:1]])
    if lowest > highest / 50:
        raise InputError(f"{path} has an lr_schedule that ends at {lowest}; those here end at 0.", option="config")
    yield "lr_schedule", SCHEDULES[name]
    yield "warmup_steps", given.get("warmup", 0)
    yield "learning_rate", highest


def _flag(name: str, value: Any, path: Path) -> list[str]:
    option = flag(name)
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    if isinstance(value, list):
        return [option, *(str(item) for item in value)]
    if isinstance(value, dict):
        raise InputError(f"{path} has {name}: {short(value)}; it must be one value.", option="config")
    return [option, str(value)]
