"""Measure how far a quantized key/value cache moves the logits of a text.

python -m minicpm_jax.kv_error --model openbmb/MiniCPM-2B-sft-bf16 --data some.txt
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from minicpm_data.diagnostics import kv_error
from minicpm_data.generation.options import CacheOptions
from minicpm_jax.backend import backend
from minicpm_jax.generation.teacher_forcing import decoded, to_float32
from minicpm_jax.options import Serving

if TYPE_CHECKING:
    from minicpm_jax.model import Model


@dataclass(frozen=True)
class Options(Serving, kv_error.Options):
    pass


def logits(model: "Model", ids: list[int], cache_options: CacheOptions) -> Iterator[np.ndarray]:
    """Yield the [T, V] logits of each chunk, computed with a new cache. Raises `InputError` for unsupported cache
    options."""
    import jax

    from minicpm_jax.generation import decoding

    decoding.check_kind(model, 1, cache_options)
    width = kv_error.PIECE
    padded = np.pad(np.array(ids, np.int32), (0, -len(ids) % width))
    cache, _ = decoding.empty(model, 1, len(padded), cache_options.kv_bits)
    step = jax.jit(decoded, donate_argnums=2)
    for start in range(0, len(ids), width):
        new = min(width, len(ids) - start)
        piece, cache = step(model, padded[None, start : start + width], cache, np.int32(new))
        yield to_float32(piece)[0, :new]


if __name__ == "__main__":
    kv_error.run(backend, logits, "python -m minicpm_jax.kv_error", Options)
