"""One optimiser step on a dictionary of arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from minicpm_data.finetune_options import is_decayed
from minicpm_mlx.adapters import use_keys
from minicpm_mlx.attention import positions_of
from minicpm_mlx.losses import Batch, Objective, token_losses
from minicpm_mlx.model import Model

Weights = dict[str, mx.array]  # name -> what is trained, float32


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


def weights_of(model: Model) -> Weights:
    """What the model trains, as float32 masters."""
    return {name: w.astype(mx.float32) for name, w in tree_flatten(model.trainable_parameters())}


def use_weights(model: Model, weights: Weights, dtypes: Mapping[str, Any]) -> None:
    """Compute with these, each in its dtype."""
    model.update(tree_unflatten([(name, w.astype(dtypes[name])) for name, w in weights.items()]))


def train_step(
    model: Model,
    weights: Weights,
    batches: Sequence[Batch],
    learning_rate: float,
    key: mx.array,
    *,
    dtypes: Mapping[str, Any],
    objective: Objective,
    optimiser: Any,
    decay: float,
    clip: float,
) -> tuple[Weights, dict[str, mx.array]]:
    """One step on micro-batches [B, T], whose tokens all weigh the same. Returns the weights, which the model then has,
    and figures: means of the objective's sums, ``weight`` the sum itself. ``decay``: share of a weight that a learning
    rate of 1 would take away."""
    gradients_of = nn.value_and_grad(model, lambda batch: objective(model, batch))
    totals: Any = None
    for batch, subkey in zip(batches, mx.random.split(key, max(len(batches), 2)), strict=False):
        use_keys(model, subkey)
        (_, sums), gradients = gradients_of(batch)
        part = sums, {name: g.astype(mx.float32) for name, g in tree_flatten(gradients)}
        totals = part if totals is None else tree_map(mx.add, totals, part)
        mx.eval(totals)  # gives up what the backward pass of this batch needed
    use_keys(model, None)
    sums, gradients = totals
    weight = mx.maximum(sums["weight"], 1)
    gradients, norm = optim.clip_grad_norm({name: g / weight for name, g in gradients.items()}, clip)
    optimiser.learning_rate = learning_rate
    weights = {name: w * (1 - learning_rate * decay) if is_decayed(name) else w for name, w in weights.items()}
    weights = optimiser.apply_gradients(gradients, weights)
    use_weights(model, weights, dtypes)
    mx.async_eval(weights, optimiser.state)
    figures = {name: value / weight for name, value in sums.items()}
    return weights, figures | {"weight": sums["weight"], "gradient_norm": norm}


def log_probabilities(model: Model, batch: Batch) -> mx.array:
    """[B]: of the targets of each row together."""
    positions = positions_of(model.config, batch["ids"], segments=batch["segments"])
    return -token_losses(model, model.hidden_states(batch["ids"], positions), batch["labels"]).sum(axis=1)
