"""What training minimises.

Dims: B rows, T tokens, C of them at a time, V vocabulary, D hidden.

Labels are the tokens themselves where they are targets, -100 elsewhere; position t - 1 predicts the token at t. The
logits of a whole batch are never there at once: with 122,753 words, 8 rows of 2048 tokens would take 8 GB.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from minicpm_data.datasets.examples import IGNORED
from minicpm_mlx.layers.rope import positions_of
from minicpm_mlx.model import Model
from minicpm_mlx.training.cross_entropy import token_losses

Batch = Mapping[str, mx.array]  # ids, labels, segments [B, T]; for DPO reference [B]
Sums = tuple[mx.array, dict[str, mx.array]]


@dataclass(frozen=True)
class Objective:
    """``name``: sft (cross entropy), dpo (arXiv 2305.18290) or orpo (2403.07691), whose strength is ``beta``.
    ``balance``: weight of the experts' `moe.imbalance`. ``remat``: recompute layers in the backward pass."""

    name: Literal["sft", "dpo", "orpo"] = "sft"
    beta: float = 0.1
    balance: float = 0.01
    remat: bool = False

    def __call__(self, model: Model, batch: Batch) -> Sums:
        """The sum to be minimised over a batch, and sums to be reported: ``weight`` is what they are divided by, the
        number of trained tokens (sft) or of pairs."""
        positions = positions_of(model.config, batch["ids"], segments=batch["segments"])
        x, imbalance = model.model(model.model.embed(batch["ids"]), positions, remat=self.remat)
        losses = token_losses(model, model.model.norm(x), batch["labels"])
        trained = batch["labels"][:, 1:] != IGNORED
        sums = OBJECTIVES[self.name](losses, trained, batch, self.beta)
        total = sums["loss"]
        if model.config.num_experts:
            sums["imbalance"] = imbalance * sums["weight"]
            total = total + self.balance * sums["imbalance"]
        return total, sums


def _supervised(losses, trained, batch, beta) -> dict[str, mx.array]:
    return {"loss": losses.sum(), "weight": trained.sum()}


def _dpo(losses, trained, batch, beta) -> dict[str, mx.array]:
    """-log sigmoid(beta (how much likelier than under the reference the chosen answer is, less that of the rejected)).
    The first half of the rows are chosen, the second rejected ones; log-probabilities are sums over the answer."""
    chosen, rejected = mx.split(-losses.sum(axis=1) - batch["reference"], 2)
    real = mx.split(trained, 2)[0].any(axis=1)  # not a row that fills up the batch
    margin = beta * (chosen - rejected)
    return {
        "loss": -(nn.log_sigmoid(margin) * real).sum(),
        "margin": (margin * real).sum(),
        "accuracy": ((margin > 0) & real).sum(),
        "weight": real.sum(),
    }


def _orpo(losses, trained, batch, beta) -> dict[str, mx.array]:
    """Mean cross entropy of the chosen answer - beta log sigmoid(log odds ratio), with mean log-probabilities."""
    mean = -losses.sum(axis=1) / mx.maximum(trained.sum(axis=1), 1)
    real = mx.split(trained, 2)[0].any(axis=1)
    # A row of nothing has the log-probability 0, whose odds are infinite.
    mean = mx.where(trained.any(axis=1), mean, -1.0)
    odds = mean - mx.log(-mx.expm1(mx.minimum(mean, -1e-6)))
    (chosen, _), (better, worse) = mx.split(mean, 2), mx.split(odds, 2)
    ratio = better - worse
    return {
        "loss": ((-chosen - beta * nn.log_sigmoid(ratio)) * real).sum(),
        "margin": (ratio * real).sum(),
        "accuracy": ((ratio > 0) & real).sum(),
        "weight": real.sum(),
    }


OBJECTIVES: dict[str, Callable[..., dict[str, mx.array]]] = {"sft": _supervised, "dpo": _dpo, "orpo": _orpo}


def mean_loss(
    model: Model, ids: mx.array | np.ndarray, labels: mx.array | np.ndarray, mask: mx.array | np.ndarray | None = None
) -> mx.array:
    """The loss that the original returns for ``labels``: a mean over all labels but -100."""
    ids, labels, mask = mx.array(ids), mx.array(labels), None if mask is None else mx.array(mask)
    hidden = model.hidden_states(ids, positions_of(model.config, ids, mask))
    return token_losses(model, hidden, labels).sum() / (labels[:, 1:] != IGNORED).sum()
