"""What training minimises."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from minicpm_jax.attention import positions_of
from minicpm_jax.model import Model

IGNORED = -100  # a label that is not trained, as in PyTorch


def next_token_loss(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of cross entropies and number of trained tokens. ``labels[t]`` is the token at t; position t - 1 predicts
    it; -100 is ignored."""
    targets = labels[:, 1:]
    trained = targets != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.where(trained, targets, 0))
    return jnp.sum(losses * trained), jnp.sum(trained)


def packed_loss(model: Model, windows: Int[Array, "B T"], bos_token_id: int, remat: bool = False) -> Float[Array, ""]:
    """Mean cross entropy over windows of documents that each begin with BOS: a document neither sees nor predicts
    another one."""
    segments = jnp.cumsum(windows == bos_token_id, axis=1)
    positions = positions_of(model.config, windows.shape, segments=segments)
    logits = model.head(model.hidden_states(windows, positions, remat=remat))
    total, count = next_token_loss(logits, jnp.where(windows == bos_token_id, IGNORED, windows))
    return total / jnp.maximum(count, 1)


def mean_loss(model: Model, ids: Int[Array, "B T"], labels: Int[Array, "B T"], mask: Int[Array, "B T"] | None = None):
    """The loss that the original returns for ``labels``: a mean over all labels but -100."""
    total, count = _sums(model, ids, labels, mask)
    return total / count


@jax.jit
def _sums(model: Model, ids, labels, mask):
    logits = model.head(model.hidden_states(ids, positions_of(model.config, ids.shape, mask=mask)))
    return next_token_loss(logits, labels)
