"""One optimizer step on a dictionary of arrays."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from minicpm_mlx.layers.ops import compiled
from minicpm_mlx.layers.rope import positions_of
from minicpm_mlx.model import Model
from minicpm_mlx.training.adapters import set_dropout_keys
from minicpm_mlx.training.cross_entropy import token_losses
from minicpm_mlx.training.images import with_images
from minicpm_mlx.training.losses import Batch, Objective, PackedObjective

Weights = dict[str, mx.array]  # parameter name -> trained array, float32
AnyObjective = Objective | PackedObjective


def weights_of(model: Model) -> Weights:
    """The model's trainable parameters as float32 master weights."""
    return {name: w.astype(mx.float32) for name, w in tree_flatten(model.trainable_parameters())}


def use_weights(model: Model, weights: Weights, dtypes: Mapping[str, Any]) -> None:
    """Update the model with these weights, each cast to its dtype."""
    model.update(tree_unflatten([(name, w.astype(dtypes[name])) for name, w in weights.items()]))


def gradients(
    model: Model,
    objective: AnyObjective,
    weights: Weights,
    batch: Batch,
    key: mx.array,
    before: Any = None,
) -> tuple[dict[str, mx.array], Weights]:
    """The objective's sums over a batch [B, T] and their gradients in float32, added to those ``before``.
    ``weights``: the trained weights in the model's dtypes; the model then holds their tracers."""
    set_dropout_keys(model, key)

    def total(weights: Weights) -> Any:
        model.update(tree_unflatten(list(weights.items())))
        return objective(model, batch)

    (_, sums), found = mx.value_and_grad(total)(weights)
    set_dropout_keys(model, None)
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
    """Weights and moments after a step with the `gradients`, and its metrics."""
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
    """One optimizer step in two compiled programs: one for the `gradients` of a batch, traced once per row width,
    and one for the `update`. The model's frozen arrays are constants of the first: they must be evaluated, and must
    not change.

    ``decay``: weight decay at a learning rate of 1, by name; other weights are not decayed.
    """

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
        mx.eval(model.parameters())  # otherwise every step would read lazily mapped files
        self.model, self.dtypes, self.optimizer = model, dtypes, optimizer
        self.gradients = compiled(functools.partial(gradients, model, objective))
        self.update = compiled(functools.partial(update, optimizer, decay, clip))

    def __call__(
        self, weights: Weights, batches: Sequence[Batch], learning_rate: float, key: mx.array
    ) -> tuple[Weights, dict[str, mx.array]]:
        """Run one step on micro-batches [B, T]; all tokens have the same weight.

        Returns the weights, which the model then uses, and the metrics: means of the objective's sums, and
        ``weight`` as a sum. An objective without a weight is a mean, of one micro-batch. Both results are lazy: drop
        all references to the old weights before evaluating, so that MLX can reuse their memory.
        """
        trained, totals = dict(tree_flatten(self.model.trainable_parameters())), None
        for batch, subkey in zip(batches, mx.random.split(key, max(len(batches), 2)), strict=False):
            if totals is not None:
                mx.async_eval(totals)  # frees the activations of the previous micro-batch
            totals = self.gradients(trained, batch, subkey, totals)
        weights, moments, figures = self.update(weights, self.optimizer.state, totals, mx.array(learning_rate))
        self.optimizer.state = moments
        use_weights(self.model, weights, self.dtypes)
        return weights, figures


def log_probabilities(model: Model, batch: Batch) -> mx.array:
    """[B]: log-probability of each row's targets, summed over the row."""
    ids, seen = with_images(model, batch)
    positions = positions_of(model.config, ids, segments=batch["segments"])
    return -token_losses(model, model.hidden_states(ids, positions, seen), batch["labels"]).sum(axis=1)
