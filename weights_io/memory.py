"""What a model takes in memory, from its config alone: weights in several dtypes, and the key/value cache."""

import math

from weights_io.config import ModelConfig
from weights_io.parameters import parameters

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
BITS = {"int8": 8, "int4": 4}
GROUP = 64  # numbers of a matrix's row that share a scale and an offset of 16 bits, as MLX quantises


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Of all weights in ``dtype``. int8 and int4 are of matrices whose rows are whole groups; the rest is bfloat16."""
    total = 0.0
    for parameter in parameters(config):
        shape = parameter.shape(config)
        if dtype in ITEM:
            size: float = ITEM[dtype]
        elif len(parameter.dims.split()) > 1 and shape[-1] % GROUP == 0:
            size = BITS[dtype] / 8 + 4 / GROUP
        else:
            size = ITEM["bfloat16"]
        total += math.prod(shape) * size
    return int(total)


def cache_bytes(config: ModelConfig, tokens: int, dtype: str) -> int:
    """Of keys and values of ``tokens`` in all layers. int8 has a scale of 4 bytes for each head, 8 heads in a tile."""
    heads = config.num_key_value_heads
    token = heads * config.head_dim * (1 if dtype == "int8" else ITEM[dtype])
    scales = -(-heads // 8) * 8 * 4 if dtype == "int8" else 0
    return 2 * config.num_hidden_layers * tokens * (token + scales)


def size(count: int | None) -> str:
    """``5.45 GB``, ``368.6 MB``; None is unknown."""
    if count is None:
        return "unknown"
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
