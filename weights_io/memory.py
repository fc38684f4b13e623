"""Memory of weights, key/value cache and training, computed from the config alone, and checks that it is available."""

import math
import re
from pathlib import Path

from weights_io.casting import group_of
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.parameters import head_parameter, parameters, target_parameters

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
MOMENTS = {"adamw": 2, "adam": 2, "muon": 1, "sgd": 0, "adafactor": 0}  # optimizer states as large as the weights
SMALLER = "take a smaller model, or in JAX more devices"  # the remedy where memory is short
ADAPTERS = "train adapters (the command lora), a smaller model, or in JAX on more devices"


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all weights in ``dtype``."""
    return sum(math.prod(parameter.shape(config)) for parameter in parameters(config)) * ITEM[dtype]


def packed_bytes(config: ModelConfig, dtype: str, bits: int, head: bool) -> int:
    """Bytes of the weights that --quantize keeps.

    Exact for MLX, which stores a scale and an offset per group. JAX stores no offsets and one scale per row of the
    head, which is up to 6% less in 4 bits and 3% less in 8 bits.

    Arguments:
        config: the model's.
        dtype: dtype of the weights that are not quantized, and of the scales.
        bits: of the matrices of the layers.
        head: whether the output head (the embedding where it is tied) is kept in 8 bits.
    """
    packed = {parameter.name: bits for parameter in target_parameters(config, ("all-linear",))}
    if head:
        packed[head_parameter(config).name] = 8
    total = 0.0
    for parameter in parameters(config):
        shape, size = parameter.shape(config), float(ITEM[dtype])
        if parameter.name in packed:
            size = packed[parameter.name] / 8 + 2 * size / group_of(shape[-1])
        total += math.prod(shape) * size
    return int(total)


def cache_bytes(config: ModelConfig, tokens: int, dtype: str) -> int:
    """Bytes of the keys and values of ``tokens`` tokens in all layers.

    int8 adds a 4-byte scale per token and head; the number of heads is padded to a multiple of 8. Latent attention
    caches a latent and a rotary key per token, each with a scale in int8, whatever the number of heads.
    """
    if config.is_latent:
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
        token = numbers + 2 * 4 if dtype == "int8" else numbers * ITEM[dtype]
        return config.num_hidden_layers * tokens * token
    heads = config.num_key_value_heads
    token = heads * config.head_dim * (1 if dtype == "int8" else ITEM[dtype])
    scales = -(-heads // 8) * 8 * 4 if dtype == "int8" else 0
    return 2 * config.num_hidden_layers * tokens * (token + scales)


def check_room(what: str, needed: int, free: int | None, remedy: str) -> None:
    """Check before an allocation that there is memory for it.

    Arguments:
        what: the subject of the message.
        needed, free: bytes; ``free`` is None where it is unknown, which passes.
        remedy: what the user can do.

    Raises:
        InputError: ``needed`` is above ``free``.
    """
    if free is not None and needed > free:
        raise InputError(no_room(what, needed, free, remedy))


def no_room(what: str, needed: int, free: int, remedy: str) -> str:
    """The message of `check_room`."""
    return f"{what} would take {size(needed)}, and {size(max(free, 0))} are free; {remedy}."


def check_weights(kind: str, needed: int, free: int | None, remedy: str | None = None) -> None:
    """`check_room` for the weights. ``kind``: a dtype, int8 or int4. ``remedy``: None suggests --quantize."""
    bits = {"int8": "4", "int4": ""}.get(kind, "8 or 4")
    fewer = f"keep them in fewer bits (--quantize {bits}), " if bits else ""
    check_room(f"the weights in {kind}", needed, free, remedy or fewer + SMALLER)


def check_cache(rows: int, tokens: int, needed: int, free: int | None) -> None:
    """`check_room` for a key/value cache of ``rows`` batch rows with ``tokens`` tokens each."""
    what = f"the keys and values of {rows} x {tokens:,} tokens"
    check_room(what, needed, free, "give a shorter prompt, fewer tokens, or fewer prompts at once")


def check_training(config: ModelConfig, optimizer: str, free: int | None, share: float = 1.0) -> None:
    """`check_room` for full fine-tuning: master weights, gradients and optimizer states, all in float32.

    ``share``: the fraction of them on this device.
    """
    needed = int((2 + MOMENTS[optimizer]) * weight_bytes(config, "float32") * share)
    check_room("training all weights (masters, gradients and moments)", needed, free, ADAPTERS)


def host_free() -> int | None:
    """Bytes of memory available on this machine; None where the system does not tell."""
    try:
        found = re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text("ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def size(count: int | None) -> str:
    """A number of bytes as text (``5.45 GB``, ``368.6 MB``); ``unknown`` for None."""
    if count is None:
        return "unknown"
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
