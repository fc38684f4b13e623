"""Measure how far a quantized key/value cache moves the logits of a text.

python -m minicpm_mlx.kv_error --model openbmb/MiniCPM-2B-sft-bf16 --data some.txt
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from minicpm_data.diagnostics import kv_error
from minicpm_data.generation.options import CacheOptions
from minicpm_mlx.backend import backend
from minicpm_mlx.generation.teacher_forcing import to_float32

if TYPE_CHECKING:
    from minicpm_mlx.model import Model


def logits(model: "Model", ids: list[int], cache_options: CacheOptions) -> Iterator[np.ndarray]:
    """Yield the [T, V] logits of each chunk, computed with a new cache. Raises `InputError` for unsupported cache
    options."""
    import mlx.core as mx

    from minicpm_mlx.generation import decoding

    decoding.check_kind(model, 1, cache_options)
    width = kv_error.PIECE
    cache = decoding.make_cache(model, [0], cache_options)
    for start in range(0, len(ids), width):
        x = model.decode(mx.array([ids[start : start + width]]), cache)
        yield to_float32(model.head(x))[0]


if __name__ == "__main__":
    kv_error.run(backend, logits, "python -m minicpm_mlx.kv_error")
