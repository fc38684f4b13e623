"""Optimizers by name, and muP's parameter groups."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers as optim

from minicpm_mlx.training.step import Weights
from weights_io.config import ModelConfig
from weights_io.parameters import Parameter, parameters


class Optimizer(Protocol):
    """The interface that a step needs: that of `mlx.optimizers`, also of `Groups` of them."""

    state: Any
    learning_rate: Any

    def init(self, parameters: Weights) -> None: ...

    def apply_gradients(self, gradients: Weights, parameters: Weights) -> Weights: ...


class Groups:
    """Several optimizers, each with its own weights and its own fraction of the learning rate.
    `mlx.optimizers.MultiOptimizer` has no such fractions, and splits the dotted names of our flat dictionary into a
    tree, in which it finds no parameter."""

    def __init__(
        self,
        optimizers: Sequence[optim.Optimizer],
        group: Callable[[str, mx.array], int],
        shares: Sequence[float] | None = None,
    ):
        """``group``: index of the optimizer that updates a weight. ``shares``: fractions of the learning rate."""
        self._optimizers, self._group = optimizers, group
        self._shares = shares or [1.0] * len(optimizers)

    def init(self, parameters: Weights) -> None:
        for part, mine in zip(self._optimizers, self._split(parameters), strict=True):
            part.init(mine)

    def apply_gradients(self, gradients: Weights, parameters: Weights) -> Weights:
        split = zip(self._optimizers, self._split(gradients), self._split(parameters), strict=True)
        return {name: w for part, g, mine in split for name, w in part.apply_gradients(g, mine).items()}

    @property
    def state(self) -> list[Any]:
        return [part.state for part in self._optimizers]

    @state.setter
    def state(self, states: list[Any]) -> None:
        for part, state in zip(self._optimizers, states, strict=True):
            part.state = state

    @property
    def learning_rate(self) -> Any:
        """The learning rate of a group with fraction 1."""
        return self._optimizers[-1].learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: Any) -> None:
        for part, share in zip(self._optimizers, self._shares, strict=True):
            part.learning_rate = rate if share == 1 else rate * share

    def _split(self, weights: Weights) -> list[Weights]:
        found: list[Weights] = [{} for _ in self._optimizers]
        for name, w in weights.items():
            found[self._group(name, w)][name] = w
        return found


def _muon() -> Groups:
    """Muon for the layers' matrices; Adam for everything else: embedding, head, norms, experts."""
    parts = optim.Muon(0.0, weight_decay=0.0), optim.Adam(0.0, bias_correction=True)
    return Groups(parts, lambda name, w: 0 if w.ndim == 2 and ".layers." in name else 1)


OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {
    "adamw": lambda: optim.Adam(0.0, bias_correction=True),  # `Step` applies AdamW's decay, but not to all weights
    "adam": lambda: optim.Adam(0.0, bias_correction=True),
    "sgd": lambda: optim.SGD(0.0),
    "adafactor": lambda: optim.Adafactor(0.0, relative_step=False, scale_parameter=True),
    "muon": _muon,
}


def mup_optimizer(config: ModelConfig, beta1: float, beta2: float) -> Groups:
    """AdamW without its decay, which is `mup_decay`. Matrices get muP's fraction of the learning rate (arXiv
    2404.06395, table 7); norms and the embedding get all of it."""
    shares = {name: parameter.learning_rate_scale(config) for name, parameter in _table(config).items()}
    each = sorted(set(shares.values()) | {1.0})
    parts = [optim.Adam(0.0, betas=[beta1, beta2], bias_correction=True) for _ in each]
    return Groups(parts, lambda name, _: each.index(shares[name]), each)


def mup_decay(config: ModelConfig, weight_decay: float) -> dict[str, float]:
    """The weight decay of each matrix at a learning rate of 1."""
    table = _table(config).items()
    return {name: weight_decay * p.learning_rate_scale(config) for name, p in table if p.init == "matrix"}


def _table(config: ModelConfig) -> Mapping[str, Parameter]:
    """The parameter table by the names of the MLX model."""
    return {name: parameter for parameter in parameters(config) for name in parameter.mlx_names(config)}
