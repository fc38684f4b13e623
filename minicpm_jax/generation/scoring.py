"""How likely given tokens are where they stand in a text, and whether greedy decoding would choose them.

Dims: B rows, T tokens, N scored tokens, D hidden, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minicpm_jax.layers.rope import positions_of
from minicpm_jax.model import Model

SCORED = 256  # tokens whose logits exist at once: 126 MB with a vocabulary of 122,753


def scores(
    model: Model, ids: np.ndarray, lengths: np.ndarray, rows: np.ndarray, at: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Score tokens that follow positions of a batch.

    Arguments:
        ids: [B, T] int32, padded on the right.
        lengths: [B] tokens of each row.
        rows, at: [N] row and position of the token before each scored one.
        targets: [N] the scored tokens.

    Returns:
        Log probabilities [N] in float32, and whether each token has the highest one [N].
    """
    x = _states(model, ids, lengths)
    likely, best = np.empty(len(rows), np.float32), np.empty(len(rows), bool)
    for start in range(0, len(rows), SCORED):
        part = slice(start, start + SCORED)
        given = (np.resize(values[part], SCORED) for values in (rows, at, targets))  # one shape for all parts
        made = _scored(model, x, *given)
        likely[part], best[part] = (np.asarray(values)[: len(rows) - start] for values in made)
    return likely, best


@jax.jit
def _states(model: Model, ids: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B T D"]:
    positions = positions_of(model.config, ids.shape, start=jnp.zeros_like(lengths), length=lengths)
    return model.hidden_states(ids, positions)


@jax.jit
def _scored(
    model: Model, x: Float[Array, "B T D"], rows: Int[Array, "N"], at: Int[Array, "N"], targets: Int[Array, "N"]
) -> tuple[Float[Array, "N"], Bool[Array, "N"]]:
    logits = model.head(x[rows, at][None])[0]
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return target - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets
