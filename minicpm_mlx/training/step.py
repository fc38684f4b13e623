"""One optimiser step on a dictionary of arrays."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from minicpm_mlx.adapters import use_keys
from minicpm_mlx.layers.ops import compiled
from minicpm_mlx.layers.rope import positions_of
from minicpm_mlx.model import Model
from minicpm_mlx.training.cross_entropy import token_losses
from minicpm_mlx.training.losses import Batch, Objective, PackedObjective

Weights = dict[str, mx.array]  # name -> what is trained, float32
AnyObjective = Objective | PackedObjective


def weights_of(model: Model) -> Weights:
    """What the model trains, as float32 masters."""
    return {name: w.astype(mx.float32) for name, w in tree_flatten(model.trainable_parameters())}


def use_weights(model: Model, weights: Weights, dtypes: Mapping[str, Any]) -> None:
    """Compute with these, each in its dtype."""
    model.update(tree_unflatten([(name, w.astype(dtypes[name])) for name, w in weights.items()]))


def gradients(
    model: Model,
    objective: AnyObjective,
    weights: Weights,
    batch: Batch,
    key: mx.array,
    before: Any = None,
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
    optimizer: Any,
    decay: Mapping[str, float],
    clip: float,
    weights: Weights,
    moments: Any,
    totals: Any,
    learning_rate: mx.array,
) -> tuple[Weights, Any, dict[str, mx.array]]:
    """Weights and moments after a step with the `gradients`, and its figures."""
    sums, found = totals
    if "weight" in sums:
        weight = mx.maximum(sums["weight"], 1)
        found = {name: g / weight for name, g in found.items()}
        sums = {name: value / weight for name, value in sums.items()} | {"weight": sums["weight"]}
    found, norm = optim.clip_grad_norm(found, clip)
    optimizer.state, optimizer.learning_rate = moments, learning_rate
    weights = {n: w * (1 - learning_rate * decay[n]) if n in decay else w for n, w in weights.items()}
    weights = optimizer.apply_gradients(found, weights)
    return weights, optimizer.state, sums | {"gradient_norm": norm}


class Step:
    """One step of an optimiser: a program for the `gradients` of a batch, traced for each width of its rows, and one
    for the `update`. What the model does not train is a constant of the first: it must be computed, and stay.
    ``decay``: share of a weight that a learning rate of 1 would take away, by name; of the others none."""

    def __init__(
        self,
        model: Model,
        *,
        dtypes: Mapping[str, Any],
        objective: AnyObjective,
        optimizer: Any,
        decay: Mapping[str, float],
        clip: float,
    ):
        mx.eval(model.parameters())  # of a file that is mapped, a program would read them with each step
        self.model, self.dtypes, self.optimizer = model, dtypes, optimizer
        self.gradients = compiled(functools.partial(gradients, model, objective))
        self.update = compiled(functools.partial(update, optimizer, decay, clip))

    def __call__(
        self, weights: Weights, batches: Sequence[Batch], learning_rate: float, key: mx.array
    ) -> tuple[Weights, dict[str, mx.array]]:
        """A step on micro-batches [B, T], whose tokens all weigh the same. Returns the weights, which the model then
        has, and figures: means of the objective's sums, ``weight`` the sum itself; an objective without a weight is a
        mean, of one batch. Both are still to be computed: by then nobody should hold the weights of before, which lie
        where the new ones can."""
        trained, totals = dict(tree_flatten(self.model.trainable_parameters())), None
        for batch, subkey in zip(batches, mx.random.split(key, max(len(batches), 2)), strict=False):
            if totals is not None:
                mx.async_eval(totals)  # gives up what the backward pass of the batch before needed
            totals = self.gradients(trained, batch, subkey, totals)
        weights, moments, figures = self.update(weights, self.optimizer.state, totals, mx.array(learning_rate))
        self.optimizer.state = moments
        use_weights(self.model, weights, self.dtypes)
        return weights, figures


def log_probabilities(model: Model, batch: Batch) -> mx.array:
    """[B]: of the targets of each row together."""
    positions = positions_of(model.config, batch["ids"], segments=batch["segments"])
    return -token_losses(model, model.hidden_states(batch["ids"], positions), batch["labels"]).sum(axis=1)
