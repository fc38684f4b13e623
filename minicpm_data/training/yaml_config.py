"""Convert the YAML file of ``--config``, in mlx_lm's format, to flags."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from minicpm_data.training.options import LoraOptions
from weights_io.command_line import former_names
from weights_io.errors import InputError, flag, short
from weights_io.files.regular import read_regular

SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}  # mlx_lm's name -> name here
OF_ITS_MACHINE = ("clear_cache_threshold", "trust_remote_code")  # keys of mlx_lm that do not affect the results
OF_LORA = "lora_parameters: {rank, scale or alpha, dropout, keys}"


def flags_of_file(path: Path, options: type) -> list[str]:
    """The flags that a YAML file stands for.

    Arguments:
        path: the file. Its keys are the fields of ``options``, or mlx_lm's ``lora_parameters`` and ``lr_schedule``.
        options: the dataclass of the command's options.

    Raises:
        InputError: the file is not a mapping, has an unknown key, or has a value of the wrong form.
    """
    from minicpm_data.yaml_text import MAX_BYTES, load  # imported only if there is a file

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
    """Name and value of each option. mlx_lm's nested options are flattened and renamed."""
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
        yield "targets", [str(key).rpartition(".")[2] for key in keys]  # self_attn.q_proj -> q_proj


def _schedule(given: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """Convert mlx_lm's {name, warmup, warmup_init, arguments: [highest, steps, lowest]} (linear: [highest, lowest,
    steps]).

    A schedule here begins at 0 with the run and ends at 0 with it. One that stays far above 0 is refused.
    """
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
    if name == "linear_schedule":  # its arguments are (first, last, steps)
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
