"""One optimiser step on a dictionary of arrays."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from minicpm_data.finetune_options import is_decayed
from minicpm_mlx.adapters import use_keys
from minicpm_mlx.arithmetic import compiled
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


def gradients(
    model: Model, objective: Objective, weights: Weights, batch: Batch, key: mx.array, before: Any = None
) -> tuple[dict[str, mx.array], Weights]:
    """The objective's sums over a batch [B, T] and their gradients in float32, added to those ``before``. ``weights``:
    what is trained, in the model's dtypes, of which the model then has tracers."""
    use_keys(model, key)

    def total(weights: Weights) -> Any:
        model.update(tree_unflatten(list(weights.items())))
        return objective(model, batch)

    (_, sums), found = mx.value_and_grad(total)(weights)
    use_keys(model, None)
    totals = sums, {name: g.astype(mx.float32) for name, g in found.items()}
    return totals if before is None else tree_map(mx.add, before, totals)


def update(
    optimiser: Any, decay: float, clip: float, weights: Weights, moments: Any, totals: Any, learning_rate: mx.array
) -> tuple[Weights, Any, dict[str, mx.array]]:
    """Weights and moments after a step with the `gradients`, and its figures."""
    sums, found = totals
    weight = mx.maximum(sums["weight"], 1)
    found, norm = optim.clip_grad_norm({name: g / weight for name, g in found.items()}, clip)
    optimiser.state, optimiser.learning_rate = moments, learning_rate
    weights = {name: w * (1 - learning_rate * decay) if is_decayed(name) else w for name, w in weights.items()}
    weights = optimiser.apply_gradients(found, weights)
    figures = {name: value / weight for name, value in sums.items()}
    return weights, optimiser.state, figures | {"weight": sums["weight"], "gradient_norm": norm}


class Step:
    """One step of an optimiser: a program for the `gradients` of a batch, traced for each width of its rows, and one
    for the `update`. What the model does not train is a constant of the first: it must be computed, and stay.
    ``decay``: share of a weight that a learning rate of 1 would take away."""

    def __init__(
        self,
        model: Model,
        *,
        dtypes: Mapping[str, Any],
        objective: Objective,
        optimiser: Any,
        decay: float,
        clip: float,
    ):
        mx.eval(model.parameters())  # of a file that is mapped, a program would read them with each step
        self.model, self.dtypes, self.optimiser = model, dtypes, optimiser
        self.gradients = compiled(functools.partial(gradients, model, objective))
        self.update = compiled(functools.partial(update, optimiser, decay, clip))

    def __call__(
        self, weights: Weights, batches: Sequence[Batch], learning_rate: float, key: mx.array
    ) -> tuple[Weights, dict[str, mx.array]]:
        """A step on micro-batches [B, T], whose tokens all weigh the same. Returns the weights, which the model then
        has, and figures: means of the objective's sums, ``weight`` the sum itself. Both are still to be computed: by
        then nobody should hold the weights of before, which lie where the new ones can."""
        trained, totals = dict(tree_flatten(self.model.trainable_parameters())), None
        for batch, subkey in zip(batches, mx.random.split(key, max(len(batches), 2)), strict=False):
            if totals is not None:
                mx.async_eval(totals)  # gives up what the backward pass of the batch before needed
            totals = self.gradients(trained, batch, subkey, totals)
        weights, moments, figures = self.update(weights, self.optimiser.state, totals, mx.array(learning_rate))
        self.optimiser.state = moments
        use_weights(self.model, weights, self.dtypes)
        return weights, figures


def log_probabilities(model: Model, batch: Batch) -> mx.array:
    """[B]: of the targets of each row together."""
    positions = positions_of(model.config, batch["ids"], segments=batch["segments"])
    return -token_losses(model, model.hidden_states(batch["ids"], positions), batch["labels"]).sum(axis=1)
