"""What training minimises.

Dims: B rows, T tokens, C of them at a time, V vocabulary, P words of it at a time, D hidden.

Labels are the tokens themselves where they are targets, -100 elsewhere; position t - 1 predicts the token at t. The
logits of a whole batch are never there at once: with 122,753 words, 8 rows of 2048 tokens would take 8 GB.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minicpm_data.datasets.examples import IGNORED
from minicpm_jax.layers.rope import positions_of
from minicpm_jax.model import Model
from minicpm_jax.training.cross_entropy import _backward, _chunked, _forward, token_losses

Batch = dict[str, Array]  # ids, labels, segments [B, T]; for DPO reference [B]
Sums = tuple[Float[Array, ""], dict[str, Array]]


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


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
        positions = positions_of(model.config, batch["ids"].shape, segments=batch["segments"])
        states, imbalance = model.states_and_imbalance(batch["ids"], positions, remat=self.remat)
        losses = token_losses(model, states, batch["labels"])
        trained = batch["labels"][:, 1:] != IGNORED
        sums = OBJECTIVES[self.name](losses, trained, batch, self.beta)
        total = sums["loss"]
        if model.config.num_experts:
            sums["imbalance"] = imbalance * sums["weight"]
            total = total + self.balance * sums["imbalance"]
        return total, sums


def _supervised(losses, trained, batch, beta) -> dict[str, Array]:
    return {"loss": jnp.sum(losses), "weight": jnp.sum(trained)}


def _dpo(losses, trained, batch, beta) -> dict[str, Array]:
    """-log sigmoid(beta (how much likelier than under the reference the chosen answer is, less that of the rejected)).
    The first half of the rows are chosen, the second rejected ones; log-probabilities are sums over the answer."""
    chosen, rejected = jnp.split(-jnp.sum(losses, axis=1) - batch["reference"], 2)
    real = jnp.any(jnp.split(trained, 2)[0], axis=1)  # not a row that fills up the batch
    margin = beta * (chosen - rejected)
    return {
        "loss": -jnp.sum(jax.nn.log_sigmoid(margin) * real),
        "margin": jnp.sum(margin * real),
        "accuracy": jnp.sum((margin > 0) & real),
        "weight": jnp.sum(real),
    }


def _orpo(losses, trained, batch, beta) -> dict[str, Array]:
    """Mean cross entropy of the chosen answer - beta log sigmoid(log odds ratio), with mean log-probabilities."""
    mean = -jnp.sum(losses, axis=1) / jnp.maximum(jnp.sum(trained, axis=1), 1)
    real = jnp.any(jnp.split(trained, 2)[0], axis=1)
    # A row of nothing has the log-probability 0, whose odds are infinite.
    mean = jnp.where(jnp.any(trained, axis=1), mean, -1.0)
    odds = mean - jnp.log(-jnp.expm1(jnp.minimum(mean, -1e-6)))
    (chosen, _), (better, worse) = jnp.split(mean, 2), jnp.split(odds, 2)
    ratio = better - worse
    return {
        "loss": jnp.sum((-chosen - beta * jax.nn.log_sigmoid(ratio)) * real),
        "margin": jnp.sum(ratio * real),
        "accuracy": jnp.sum((ratio > 0) & real),
        "weight": jnp.sum(real),
    }


OBJECTIVES: dict[str, Callable[..., dict[str, Array]]] = {"sft": _supervised, "dpo": _dpo, "orpo": _orpo}


def packed_loss(model: Model, windows: Int[Array, "B T"], bos_token_id: int, remat: bool = False) -> Float[Array, ""]:
    """Mean cross entropy over windows of documents that each begin with BOS: a document neither sees nor predicts
    another one. A mixture of experts has a hundredth of its imbalance added."""
    begins = windows == bos_token_id
    segments = 1 + jnp.cumsum(begins, axis=1)  # 1 is what a window begins in the middle of
    batch = {"ids": windows, "labels": jnp.where(begins, IGNORED, windows), "segments": segments}
    total, sums = Objective(remat=remat)(model, batch)
    return total / jnp.maximum(sums["weight"], 1)


def mean_loss(model: Model, ids: Int[Array, "B T"], labels: Int[Array, "B T"], mask: Int[Array, "B T"] | None = None):
    """The loss that the original returns for ``labels``: a mean over all labels but -100."""
    return _mean_loss(model, ids, labels, mask)


@jax.jit
def _mean_loss(model: Model, ids, labels, mask):
    hidden = model.hidden_states(ids, positions_of(model.config, ids.shape, mask=mask))
    return jnp.sum(token_losses(model, hidden, labels)) / jnp.sum(labels[:, 1:] != IGNORED)
