"""How likely given tokens are where they stand in a text, and whether greedy decoding would choose them.

Dims: B rows, T tokens, N scored tokens, D hidden, V vocabulary.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from minicpm_data.generation.options import MOST_LOGPROBS
from minicpm_mlx.generation.sampling import Scores, score
from minicpm_mlx.layers.rope import positions_of
from minicpm_mlx.layers.row_lora import adapter_rows
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


def prompt_scores(model: Model, ids: Sequence[int], adapter: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How likely each token of a prompt but the first is.

    Arguments:
        ids: N tokens.
        adapter: as in `GenerationRequest`.

    Returns:
        `Scores` of N - 1 tokens, in arrays of the host.
    """
    count, found = len(ids) - 1, list[list[np.ndarray]]()
    shape = 0, min(MOST_LOGPROBS, model.config.vocab_size)
    if count == 0:
        return np.zeros(0, np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    with adapter_rows(mx.array([adapter]) if adapter else None):
        x = _states(model, mx.array([ids]), np.array([len(ids)]))
    for start in range(0, count, SCORED):
        at = np.arange(start, min(start + SCORED, count))
        made = _described(model, x, *map(mx.array, (np.zeros_like(at), at, np.array(ids)[at + 1])))
        found.append([np.asarray(values) for values in made])
    logprob, likeliest, logprobs = (np.concatenate(values) for values in zip(*found, strict=True))
    return logprob, likeliest, logprobs


def prepare_scores(model: Model, ids: Sequence[int], adapter: int = 0) -> None:
    """Compile the programs that `prompt_scores` needs for these arguments. MLX has none."""


def _described(model: Model, x: mx.array, rows: mx.array, at: mx.array, targets: mx.array) -> Scores:
    return score(model.head(x[rows, at][None])[0], targets)


def _states(model: Model, ids: mx.array, lengths: np.ndarray) -> mx.array:
    """[B, T, D]. The lengths matter to dynamic NTK and LongRoPE alone; without them RoPE is a kernel."""
    length = None if model.config.rope_scaling is None else mx.array(lengths)
    return model.hidden_states(ids, positions_of(model.config, ids, length=length))


def _scored(model: Model, x: mx.array, rows: mx.array, at: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    logits = model.head(x[rows, at][None])[0]
    target = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return target - mx.logsumexp(logits, axis=-1), mx.argmax(logits, axis=-1) == targets
