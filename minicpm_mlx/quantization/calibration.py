"""Run one layer of a model on calibration texts, and count the inputs of its matrices."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from minicpm_data.calibration.inputs import InputStats
from minicpm_mlx.layers.rope import positions_of
from minicpm_mlx.model import LAYERS, DecoderLayer
from weights_io.config import ModelConfig

ROWS = 8  # windows that run at once


class Recorder(nn.Module):
    """A module that shows its inputs before it uses them."""

    def __init__(self, module: Any, show: Callable[[mx.array], None]):
        super().__init__()
        self.module, self._show = module, show

    def __call__(self, x: mx.array) -> mx.array:
        self._show(x)
        return self.module(x)


def run_layer(
    config: ModelConfig, weights: Mapping[str, np.ndarray], x: np.ndarray, recorded: Mapping[str, InputStats]
) -> np.ndarray:
    """As `minicpm_data.calibration.inputs.LayerRunner`."""
    layer = LAYERS.get(config.model_type, DecoderLayer)(config)
    layer.load_weights([(name, mx.array(array)) for name, array in weights.items()])
    for name, stats in recorded.items():
        parent, _, last = name.rpartition(".")
        module = getattr(layer, parent)
        setattr(module, last, Recorder(getattr(module, last), _counter(stats)))
    made = []
    for start in range(0, len(x), ROWS):
        rows = mx.array(x[start : start + ROWS])
        made.append(np.array(layer(rows, positions_of(config, rows[..., 0]))[0]))
    return np.concatenate(made)


def _counter(stats: InputStats) -> Callable[[mx.array], None]:
    def count(x: mx.array) -> None:
        flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        stats.add(np.array(flat.T @ flat), np.array(mx.abs(flat).sum(axis=0)), len(flat))

    return count
