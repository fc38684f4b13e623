"""What training minimises."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from minicpm_mlx.attention import positions_of
from minicpm_mlx.model import Model

IGNORED = -100  # a label that is not trained, as in PyTorch


def next_token_loss(logits: mx.array, labels: mx.array) -> tuple[mx.array, mx.array]:
    """Sum of cross entropies and number of trained tokens, of logits [B, T, V]. ``labels[t]`` [B, T] is the token at
    t; position t - 1 predicts it; -100 is ignored."""
    targets = labels[:, 1:]
    trained = targets != IGNORED
    losses = nn.losses.cross_entropy(logits[:, :-1], mx.where(trained, targets, 0))
    return mx.sum(losses * trained), mx.sum(trained)


def mean_loss(
    model: Model, ids: mx.array | np.ndarray, labels: mx.array | np.ndarray, mask: mx.array | np.ndarray | None = None
) -> mx.array:
    """The loss that the original returns for ``labels``: a mean over all labels but -100."""
    ids, mask = mx.array(ids), None if mask is None else mx.array(mask)
    logits = model.head(model.hidden_states(ids, positions_of(model.config, ids, mask)))
    total, count = next_token_loss(logits, mx.array(labels))
    return total / count
