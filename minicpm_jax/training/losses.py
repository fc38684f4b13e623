"""Training losses.

Dims: B rows, T tokens, C tokens of a chunk, V vocabulary, P vocabulary of a chunk, D hidden.

Labels are the token ids at targets and -100 elsewhere; position t - 1 predicts the token at t. The logits of a whole
batch never exist at once: with a vocabulary of 122,753, 8 rows of 2048 tokens would take 8 GB.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minicpm_data.datasets.examples import IGNORED
from minicpm_data.training.objectives import Batch, ObjectiveOptions, Sums, documents_apart
from minicpm_jax.layers.rope import positions_of
from minicpm_jax.model import Model
from minicpm_jax.training.cross_entropy import _backward, _chunked, _forward, token_losses
from minicpm_jax.training.images import with_images

_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


@dataclass(frozen=True)
class Objective(ObjectiveOptions):
    """The loss of fine-tuning: sft, dpo or orpo."""

    def __call__(self, model: Model, batch: Batch) -> Sums:
        """`ObjectiveOptions.sums` of a batch."""
        ids, seen = with_images(model, batch)
        positions = positions_of(model.config, ids.shape, segments=batch["segments"])
        states, aux_loss = model.hidden_states_and_aux_loss(ids, positions, remat=self.remat, features=seen)
        losses = token_losses(model, states, batch["labels"])
        return self.sums(jnp, losses, batch, aux_loss if model.config.num_experts else None)


@dataclass(frozen=True)
class PackedObjective:
    """`packed_loss` of a batch of windows: a mean, without a weight."""

    bos_token_id: int
    remat: bool = False

    def __call__(self, model: Model, batch: Batch) -> Sums:
        loss = packed_loss(model, batch["ids"], self.bos_token_id, self.remat)
        return loss, {"loss": loss}


def packed_loss(model: Model, windows: Int[Array, "B T"], bos_token_id: int, remat: bool = False) -> Float[Array, ""]:
    """Mean cross entropy over windows of packed documents, each of which begins with BOS. A document neither attends
    to nor predicts another one. A mixture of experts adds a hundredth of its load-balancing loss."""
    total, sums = Objective(remat=remat)(model, documents_apart(jnp, windows, bos_token_id))
    return total / jnp.maximum(sums["weight"], 1)


def mean_loss(model: Model, ids: Int[Array, "B T"], labels: Int[Array, "B T"], mask: Int[Array, "B T"] | None = None):
    """The loss that the original returns for ``labels``: the mean over all labels except -100."""
    return _mean_loss(model, ids, labels, mask)


@jax.jit
def _mean_loss(model: Model, ids, labels, mask):
    hidden = model.hidden_states(ids, positions_of(model.config, ids.shape, mask=mask))
    return jnp.sum(token_losses(model, hidden, labels)) / jnp.sum(labels[:, 1:] != IGNORED)


@jax.jit
def label_losses(model: Model, ids: Int[Array, "B T"], labels: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Cross entropy of each label, at the label's own position; 0 where there is none."""
    return token_losses(model, model.hidden_states(ids, positions_of(model.config, ids.shape)), labels)
