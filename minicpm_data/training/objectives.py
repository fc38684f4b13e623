"""What training minimises, of the loss of each token, in the arrays of either backend: ``xp`` is `jax.numpy` or
`mlx.core`.

Dims: B rows, T tokens. Labels are the tokens themselves where they are targets, -100 elsewhere; position t - 1 predicts
the token at t.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minicpm_data.datasets.examples import IGNORED

Batch = Mapping[str, Any]  # ids, labels, segments [B, T]; for DPO reference [B]
Sums = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class ObjectiveOptions:
    """``name``: sft (cross entropy), dpo (arXiv 2305.18290) or orpo (2403.07691), whose strength is ``beta``.
    ``balance``: weight of the experts' `moe.load_balancing_loss`. ``remat``: recompute layers in the backward pass."""

    name: Literal["sft", "dpo", "orpo"] = "sft"
    beta: float = 0.1
    balance: float = 0.01
    remat: bool = False

    def sums(self, xp: Any, losses: Any, batch: Batch, imbalance: Any | None) -> Sums:
        """The sum to be minimised over a batch whose tokens have these ``losses`` [B, T], and sums to be reported:
        ``weight`` is what they are divided by, the number of trained tokens (sft) or of pairs. ``imbalance``: None
        where there are no experts."""
        trained = batch["labels"][:, 1:] != IGNORED
        sums = OBJECTIVES[self.name](xp, losses, trained, batch, self.beta)
        total = sums["loss"]
        if imbalance is not None:
            sums["imbalance"] = imbalance * sums["weight"]
            total = total + self.balance * sums["imbalance"]
        return total, sums


def _supervised(xp: Any, losses: Any, trained: Any, batch: Batch, beta: float) -> dict[str, Any]:
    return {"loss": xp.sum(losses), "weight": xp.sum(trained)}


def _dpo(xp: Any, losses: Any, trained: Any, batch: Batch, beta: float) -> dict[str, Any]:
    """-log sigmoid(beta (how much likelier than under the reference the chosen answer is, less that of the rejected)).
    The first half of the rows are chosen, the second rejected ones; log-probabilities are sums over the answer."""
    chosen, rejected = xp.split(-xp.sum(losses, axis=1) - batch["reference"], 2)
    real = xp.any(xp.split(trained, 2)[0], axis=1)  # not a row that fills up the batch
    margin = beta * (chosen - rejected)
    return {
        "loss": -xp.sum(_log_sigmoid(xp, margin) * real),
        "margin": xp.sum(margin * real),
        "accuracy": xp.sum((margin > 0) & real),
        "weight": xp.sum(real),
    }


def _orpo(xp: Any, losses: Any, trained: Any, batch: Batch, beta: float) -> dict[str, Any]:
    """Mean cross entropy of the chosen answer - beta log sigmoid(log odds ratio), with mean log-probabilities."""
    mean = -xp.sum(losses, axis=1) / xp.maximum(xp.sum(trained, axis=1), 1)
    real = xp.any(xp.split(trained, 2)[0], axis=1)
    # A row of nothing has the log-probability 0, whose odds are infinite.
    mean = xp.where(xp.any(trained, axis=1), mean, -1.0)
    odds = mean - xp.log(-xp.expm1(xp.minimum(mean, -1e-6)))
    (chosen, _), (better, worse) = xp.split(mean, 2), xp.split(odds, 2)
    ratio = better - worse
    return {
        "loss": xp.sum((-chosen - beta * _log_sigmoid(xp, ratio)) * real),
        "margin": xp.sum(ratio * real),
        "accuracy": xp.sum((ratio > 0) & real),
        "weight": xp.sum(real),
    }


def _log_sigmoid(xp: Any, x: Any) -> Any:
    return -xp.logaddexp(-x, 0.0)


OBJECTIVES: dict[str, Callable[..., dict[str, Any]]] = {"sft": _supervised, "dpo": _dpo, "orpo": _orpo}


def documents_apart(xp: Any, windows: Any, bos_token_id: int) -> dict[str, Any]:
    """A batch of windows [B, T] of documents that each begin with BOS: a document neither sees nor predicts another
    one."""
    begins = windows == bos_token_id
    segments = 1 + xp.cumsum(begins.astype(xp.int32), axis=1)  # 1 is what a window begins in the middle of
    return {"ids": windows, "labels": xp.where(begins, IGNORED, windows), "segments": segments}
