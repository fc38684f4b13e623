"""Training losses.

Dims: B rows, T tokens, C tokens of a chunk, V vocabulary, D hidden.

Labels are the token ids at targets and -100 elsewhere; position t - 1 predicts the token at t. The logits of a whole
batch never exist at once: with a vocabulary of 122,753, 8 rows of 2048 tokens would take 8 GB.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from minicpm_data.datasets.examples import IGNORED
from minicpm_data.training.objectives import Batch, ObjectiveOptions, Sums, documents_apart
from minicpm_mlx.layers.rope import positions_of
from minicpm_mlx.model import Model
from minicpm_mlx.training.cross_entropy import token_losses
from minicpm_mlx.training.images import with_images


@dataclass(frozen=True)
class Objective(ObjectiveOptions):
    """The loss of fine-tuning: sft, dpo or orpo."""

    def __call__(self, model: Model, batch: Batch) -> Sums:
        """`ObjectiveOptions.sums` of a batch."""
        ids, seen = with_images(model, batch)
        positions = positions_of(model.config, ids, segments=batch["segments"])
        states, aux_loss = model.hidden_states_and_aux_loss(ids, positions, remat=self.remat, features=seen)
        losses = token_losses(model, states, batch["labels"])
        return self.sums(mx, losses, batch, aux_loss if model.config.num_experts else None)


@dataclass(frozen=True)
class PackedObjective:
    """`packed_loss` of a batch of windows: a mean, without a weight."""

    bos_token_id: int
    remat: bool = False

    def __call__(self, model: Model, batch: Batch) -> Sums:
        loss = packed_loss(model, batch["ids"], self.bos_token_id, self.remat)
        return loss, {"loss": loss}


def packed_loss(model: Model, windows: mx.array, bos_token_id: int, remat: bool = False) -> mx.array:
    """Mean cross entropy over windows [B, T] of packed documents, each of which begins with BOS. A document neither
    attends to nor predicts another one. A mixture of experts adds a hundredth of its load-balancing loss."""
    total, sums = Objective(remat=remat)(model, documents_apart(mx, windows, bos_token_id))
    return total / mx.maximum(sums["weight"], 1)


def mean_loss(
    model: Model, ids: mx.array | np.ndarray, labels: mx.array | np.ndarray, mask: mx.array | np.ndarray | None = None
) -> mx.array:
    """The loss that the original returns for ``labels``: the mean over all labels except -100."""
    ids, labels, mask = mx.array(ids), mx.array(labels), None if mask is None else mx.array(mask)
    hidden = model.hidden_states(ids, positions_of(model.config, ids, mask))
    return token_losses(model, hidden, labels).sum() / (labels[:, 1:] != IGNORED).sum()


def label_losses(model: Model, ids: mx.array | np.ndarray, labels: mx.array | np.ndarray) -> mx.array:
    """Cross entropy of each label [B, T], at the label's own position; 0 where there is none."""
    ids, labels = mx.array(ids), mx.array(labels)
    return token_losses(model, model.hidden_states(ids, positions_of(model.config, ids)), labels)
