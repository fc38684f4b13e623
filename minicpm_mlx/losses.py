"""What training minimises.

Dims: B rows, T tokens, C of them at a time, V vocabulary, D hidden.

Labels are the tokens themselves where they are targets, -100 elsewhere; position t - 1 predicts the token at t. The
logits of a whole batch are never there at once: with 122,753 words, 8 rows of 2048 tokens would take 8 GB.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from minicpm_data.batches import IGNORED
from minicpm_mlx.arithmetic import divided
from minicpm_mlx.attention import positions_of
from minicpm_mlx.model import Model

LOGITS = 2**25  # most logits at once: 134 MB in float32, of which MLX holds six to ten arrays at once

Batch = Mapping[str, mx.array]  # ids, labels, segments [B, T]; for DPO reference [B]
Sums = tuple[mx.array, dict[str, mx.array]]


def token_losses(model: Model, hidden: mx.array, labels: mx.array) -> mx.array:
    """Cross entropy of each label [B, T] in float32, at its own position, from hidden [B, T, D]; 0 where there is
    none."""
    hidden = divided(hidden, model.config.logit_divisor)
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    chunk = max(1, LOGITS // (labels.shape[0] * model.config.vocab_size))
    trained_head = bool(head.trainable_parameters())
    ahead = model.training and not trained_head
    losses = _chunked(chunk, hidden[:, :-1], head.weight, labels[:, 1:], trained_head, ahead)
    return mx.pad(losses, [(0, 0), (1, 0)])


def _chunked(
    chunk: int, hidden: mx.array, weight: mx.array, targets: mx.array, trained_head: bool, ahead: bool
) -> mx.array:
    """Cross entropies [B, T] of hidden [B, T, D] and weight [V, D], C tokens of each row at a time. The gradient is
    spelled out: MLX would work on all chunks at once (measured: 83 MB where the logits of all are 67, and 9 with each
    chunk made to depend on the one before), and add up the weight's gradient in the weight's dtype. ``ahead``: hidden's
    gradient but for the factor that comes from above is made of the logits while they are there: two products with a
    frozen head, not three; one too many where no gradient follows."""
    parts = [slice(at, at + chunk) for at in range(0, targets.shape[1], chunk)]
    made: list[mx.array] = []  # ahead

    @mx.custom_function
    def losses(hidden: mx.array, weight: mx.array) -> mx.array:
        found: list[mx.array] = []
        made.clear()
        for part in parts:
            before = found[-1:] + made[-1:]
            x = mx.depends(hidden[:, part], before) if before else hidden[:, part]
            logits, target, trained = _logits(x, targets[:, part], weight)
            right = mx.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
            found.append(mx.where(trained, mx.logsumexp(logits, axis=-1) - right, 0))
            if ahead:
                made.append(_share(logits, target, trained).astype(x.dtype) @ weight)
        return mx.concatenate(found, axis=1)

    @losses.vjp
    def backward(primals: Any, gradient: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        hidden, weight = primals
        if ahead:
            below = mx.concatenate(made, axis=1)
            return (below * gradient[..., None]).astype(below.dtype), mx.zeros_like(weight)
        total = mx.zeros(weight.shape)
        parts_below: list[mx.array] = []
        for part in parts:
            # A frozen head's gradient is used by nobody, and so never computed unless something depends on it.
            before = parts_below[-1:] + [total] * trained_head
            x = mx.depends(hidden[:, part], before) if parts_below else hidden[:, part]
            share = _share(*_logits(x, targets[:, part], weight)) * gradient[:, part, None]
            share = share.astype(x.dtype)
            total = total + (share.flatten(0, 1).T @ x.flatten(0, 1)).astype(mx.float32)
            parts_below.append(share @ weight)
        return mx.concatenate(parts_below, axis=1), total.astype(weight.dtype)

    found: Any = losses(hidden, weight)
    return found


def _share(logits: mx.array, target: mx.array, trained: mx.array) -> mx.array:
    """The gradient of the cross entropies [B, C] with respect to the logits [B, C, V]."""
    right = target[..., None] == mx.arange(logits.shape[-1])
    return mx.where(trained[..., None], mx.softmax(logits, axis=-1) - right, 0)


def _logits(x: mx.array, targets: mx.array, weight: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Logits [B, C, V] in float32; targets with 0 for those that are ignored; which are not."""
    return (x @ weight.T).astype(mx.float32), mx.maximum(targets, 0), targets != IGNORED


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
