"""The training objectives of both backends, computed from the cross entropy of each token.

Dims: B batch rows, T tokens. The label of a target is its token id; other labels are -100. Position t - 1 predicts
token t.
``xp`` is `jax.numpy` or `mlx.core`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minicpm_data.datasets.examples import IGNORED

Batch = Mapping[str, Any]  # ids, labels, segments [B, T]; for DPO reference [B]
Sums = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class ObjectiveOptions:
    """The choice of the objective.

    Attributes:
        name: sft (cross entropy), dpo (arXiv 2305.18290) or orpo (arXiv 2403.07691).
        beta: the strength of dpo and orpo.
        balance: the weight of the load-balancing loss of a mixture of experts.
        remat: recompute the layers in the backward pass.
    """

    name: Literal["sft", "dpo", "orpo"] = "sft"
    beta: float = 0.1
    balance: float = 0.01
    remat: bool = False

    def sums(self, xp: Any, losses: Any, batch: Batch, imbalance: Any | None) -> Sums:
        """The sum to minimize over a batch, and the sums to report.

        Arguments:
            xp: `jax.numpy` or `mlx.core`.
            losses: the cross entropy of each token, [B, T - 1].
            batch: the arrays of the batch.
            imbalance: the load-balancing loss; None for a dense model.

        Returns:
            The sum, and the sums by name. ``weight`` is their divisor: the number of trained tokens (sft) or pairs.
        """
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
    """-log sigmoid(beta (r_chosen - r_rejected)), where r is the log-probability of an answer minus the reference's.

    The first half of the rows are the chosen answers, the second half the rejected ones. Log-probabilities are summed
    over the tokens of an answer.
    """
    chosen, rejected = xp.split(-xp.sum(losses, axis=1) - batch["reference"], 2)
    real = xp.any(xp.split(trained, 2)[0], axis=1)  # False for padding rows
    margin = beta * (chosen - rejected)
    return {
        "loss": -xp.sum(_log_sigmoid(xp, margin) * real),
        "margin": xp.sum(margin * real),
        "accuracy": xp.sum((margin > 0) & real),
        "weight": xp.sum(real),
    }


def _orpo(xp: Any, losses: Any, trained: Any, batch: Batch, beta: float) -> dict[str, Any]:
    """Cross entropy of the chosen answer - beta log sigmoid(log odds ratio), with log-probabilities per token."""
    mean = -xp.sum(losses, axis=1) / xp.maximum(xp.sum(trained, axis=1), 1)
    real = xp.any(xp.split(trained, 2)[0], axis=1)
    # A padding row has log-probability 0, and so infinite odds.
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
    """A pretraining batch in which documents neither attend to nor predict each other.

    Arguments:
        xp: `jax.numpy` or `mlx.core`.
        windows: token ids [B, T] of documents that each start with BOS.
        bos_token_id: the id of BOS.

    Returns:
        ids, labels and segments, [B, T] each.
    """
    begins = windows == bos_token_id
    segments = 1 + xp.cumsum(begins.astype(xp.int32), axis=1)  # 1: the document began in an earlier window
    return {"ids": windows, "labels": xp.where(begins, IGNORED, windows), "segments": segments}
