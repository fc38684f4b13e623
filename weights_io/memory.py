"""What a model takes in memory, from its config alone: weights in several dtypes, and the key/value cache; and whether
there is room for it."""

import math
import re
from pathlib import Path

from weights_io.casting import group_of
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.parameters import EMBEDDING, HEAD, parameters, target_parameters

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
MOMENTS = {"adamw": 2, "adam": 2, "muon": 1, "sgd": 0, "adafactor": 0}  # an optimizer's, of each weight's size
SMALLER = "take a smaller model, or in JAX more devices"  # what to do where there is no room
ADAPTERS = "train adapters (the command lora), a smaller model, or in JAX on more devices"


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Of all weights in ``dtype``."""
    return sum(math.prod(parameter.shape(config)) for parameter in parameters(config)) * ITEM[dtype]


def packed_bytes(config: ModelConfig, dtype: str, bits: int, head: bool) -> int:
    """What --quantize holds: weights in ``dtype`` of which the matrices of the layers are in ``bits`` bits and, with
    ``head``, its table in 8. Exact in MLX, where each group has a scale and an offset; JAX has no offsets, and of the
    head one scale for a row, which is up to 6 in a hundred less in 4 bits and 3 in 8, of scales in 16 bits."""
    packed = {parameter.name: bits for parameter in target_parameters(config, ("all-linear",))}
    if head:
        packed[(EMBEDDING if config.tie_word_embeddings else HEAD).name] = 8
    total = 0.0
    for parameter in parameters(config):
        shape, size = parameter.shape(config), float(ITEM[dtype])
        if parameter.name in packed:
            size = packed[parameter.name] / 8 + 2 * size / group_of(shape[-1])
        total += math.prod(shape) * size
    return int(total)


def cache_bytes(config: ModelConfig, tokens: int, dtype: str) -> int:
    """Of keys and values of ``tokens`` in all layers. int8 has a scale of 4 bytes for each head, 8 heads in a tile."""
    heads = config.num_key_value_heads
    token = heads * config.head_dim * (1 if dtype == "int8" else ITEM[dtype])
    scales = -(-heads // 8) * 8 * 4 if dtype == "int8" else 0
    return 2 * config.num_hidden_layers * tokens * (token + scales)


def check_room(what: str, needed: int, free: int | None, remedy: str) -> None:
    """Asked before anything is allocated: `InputError` where more bytes are ``needed`` than are ``free`` (None: nobody
    knows)."""
    if free is not None and needed > free:
        raise InputError(no_room(what, needed, free, remedy))


def no_room(what: str, needed: int, free: int, remedy: str) -> str:
    """The sentence that says so."""
    return f"{what} would take {size(needed)}, and {size(max(free, 0))} are free; {remedy}."


def check_weights(kind: str, needed: int, free: int | None, remedy: str | None = None) -> None:
    """`check_room` for the weights of a ``kind``, a dtype or int8 or int4. ``remedy``: None where --quantize is one."""
    bits = {"int8": "4", "int4": ""}.get(kind, "8 or 4")
    fewer = f"keep them in fewer bits (--quantize {bits}), " if bits else ""
    check_room(f"the weights in {kind}", needed, free, remedy or fewer + SMALLER)


def check_cache(rows: int, tokens: int, needed: int, free: int | None) -> None:
    """`check_room` for the keys and values of so many tokens of each of the ``rows``."""
    what = f"the keys and values of {rows} x {tokens:,} tokens"
    check_room(what, needed, free, "give a shorter prompt, fewer tokens, or fewer prompts at once")


def check_training(config: ModelConfig, optimizer: str, free: int | None, share: float = 1.0) -> None:
    """`check_room` for training all weights, a ``share`` of which is here: masters, gradients and what the optimizer
    keeps, in float32."""
    needed = int((2 + MOMENTS[optimizer]) * weight_bytes(config, "float32") * share)
    check_room("training all weights (masters, gradients and moments)", needed, free, ADAPTERS)


def host_free() -> int | None:
    """Bytes that programs on this machine can still be given; None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text("ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def size(count: int | None) -> str:
    """``5.45 GB``, ``368.6 MB``; None is unknown."""
    if count is None:
        return "unknown"
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
