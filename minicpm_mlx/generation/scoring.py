"""How likely given tokens are where they stand in a text, and whether greedy decoding would choose them.

Dims: B rows, T tokens, N scored tokens, D hidden, V vocabulary.
"""

import mlx.core as mx
import numpy as np

from minicpm_mlx.layers.rope import positions_of
from minicpm_mlx.model import Model

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
    x = _states(model, mx.array(ids), lengths)
    likely, best = np.empty(len(rows), np.float32), np.empty(len(rows), bool)
    for start in range(0, len(rows), SCORED):
        part = slice(start, start + SCORED)
        made = _scored(model, x, *(mx.array(values[part]) for values in (rows, at, targets)))
        likely[part], best[part] = map(np.asarray, made)
    return likely, best


def _states(model: Model, ids: mx.array, lengths: np.ndarray) -> mx.array:
    """[B, T, D]. The lengths matter to dynamic NTK and LongRoPE alone; without them RoPE is a kernel."""
    length = None if model.config.rope_scaling is None else mx.array(lengths)
    return model.hidden_states(ids, positions_of(model.config, ids, length=length))


def _scored(model: Model, x: mx.array, rows: mx.array, at: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    logits = model.head(x[rows, at][None])[0]
    target = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return target - mx.logsumexp(logits, axis=-1), mx.argmax(logits, axis=-1) == targets
