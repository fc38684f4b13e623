"""Run one layer of a model on calibration texts, and count the inputs of its matrices."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minicpm_data.calibration.inputs import InputStats
from minicpm_jax.layers.rope import positions_of
from minicpm_jax.model import LAYERS, DecoderLayer, nested
from weights_io.config import ModelConfig

ROWS = 8  # windows that run at once


class Recorder(nnx.Module):
    """A module that shows its inputs before it uses them."""

    def __init__(self, module: Any, show: Callable[[jax.Array], None]):
        self.module, self._show = module, show

    def __call__(self, x: jax.Array) -> jax.Array:
        self._show(x)
        return self.module(x)


def run_layer(
    config: ModelConfig, weights: Mapping[str, np.ndarray], x: np.ndarray, recorded: Mapping[str, InputStats]
) -> np.ndarray:
    """As `minicpm_data.calibration.inputs.LayerRunner`."""
    held = {name: jnp.asarray(array) for name, array in weights.items()}
    made = []
    for start in range(0, len(x), ROWS):
        rows = x[start : start + ROWS]
        y, sums = _run(held, jnp.asarray(rows), config, tuple(recorded))
        made.append(np.asarray(y))
        for name, (gram, magnitude) in sums.items():
            recorded[name].add(np.asarray(gram), np.asarray(magnitude), rows.shape[0] * rows.shape[1])
    return np.concatenate(made)


@functools.partial(jax.jit, static_argnames=("config", "recorded"))
def _run(weights: dict[str, jax.Array], x: jax.Array, config: ModelConfig, recorded: tuple[str, ...]) -> Any:
    layer = LAYERS.get(config.model_type, DecoderLayer)(nested(weights), config)
    sums: dict[str, tuple[jax.Array, jax.Array]] = {}

    def counter(name: str) -> Callable[[jax.Array], None]:
        def count(x: jax.Array) -> None:
            flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
            sums[name] = jnp.matmul(flat.T, flat, precision="highest"), jnp.abs(flat).sum(axis=0)

        return count

    for name in recorded:
        parent, _, last = name.rpartition(".")
        module = getattr(layer, parent)
        setattr(module, last, Recorder(getattr(module, last), counter(name)))
    return layer(x, positions_of(config, x.shape[:2]))[0], sums
