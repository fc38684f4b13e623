"""Optimizers by name."""

from collections.abc import Callable
from typing import Any

import mlx.optimizers as optim

from minicpm_mlx.training.step import Weights


class Muon:
    """Muon for the layers' matrices, Adam for all else: embedding, head, norms, experts."""

    def __init__(self) -> None:
        self.parts = optim.Muon(0.0, weight_decay=0.0), optim.Adam(0.0, bias_correction=True)

    def init(self, weights: Weights) -> None:
        for part, mine in zip(self.parts, self._split(weights), strict=True):
            part.init(mine)

    def apply_gradients(self, gradients: Weights, weights: Weights) -> Weights:
        split = zip(self.parts, self._split(gradients), self._split(weights), strict=True)
        return {name: w for part, g, mine in split for name, w in part.apply_gradients(g, mine).items()}

    @property
    def state(self) -> list[Any]:
        return [part.state for part in self.parts]

    @state.setter
    def state(self, states: list[Any]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.state = state

    @property
    def learning_rate(self) -> Any:
        return self.parts[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        for part in self.parts:
            part.learning_rate = rate

    @staticmethod
    def _split(weights: Weights) -> list[Weights]:
        def is_matrix(name: str) -> bool:
            return weights[name].ndim == 2 and ".layers." in name

        return [{name: w for name, w in weights.items() if is_matrix(name) == wanted} for wanted in (True, False)]


OPTIMISERS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optim.Adam(0.0, bias_correction=True),  # `train_step` decays, as AdamW would, but not all weights
    "adam": lambda: optim.Adam(0.0, bias_correction=True),
    "sgd": lambda: optim.SGD(0.0),
    "adafactor": lambda: optim.Adafactor(0.0, relative_step=False, scale_parameter=True),
    "muon": Muon,
}
