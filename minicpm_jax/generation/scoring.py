"""How likely given tokens are where they stand in a text, and whether greedy decoding would choose them.

Dims: B rows, T tokens, N scored tokens, D hidden, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minicpm_data.generation.options import MOST_LOGPROBS
from minicpm_jax.generation.decoding import bucket_length, home_of
from minicpm_jax.generation.sampling import Scores, score
from minicpm_jax.layers.rope import positions_of
from minicpm_jax.layers.row_lora import adapter_rows
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
    x = _states(model, *_padded(model, ids, adapter))
    for start in range(0, count, SCORED):
        at = np.minimum(np.arange(start, start + SCORED, dtype=np.int32), count - 1)
        made = _described(model, x, np.zeros_like(at), at, np.array(ids, np.int32)[at + 1])
        found.append([np.asarray(values)[: count - start] for values in made])
    logprob, likeliest, logprobs = (np.concatenate(values) for values in zip(*found, strict=True))
    return logprob, likeliest, logprobs


def prepare_scores(model: Model, ids: Sequence[int], adapter: int = 0) -> None:
    """Compile the programs that `prompt_scores` needs for these arguments; on any thread."""
    given = _padded(model, ids, adapter)
    x = jax.eval_shape(_states, model, *given)
    _states.lower(model, *given).compile()
    at = np.zeros(SCORED, np.int32)
    home = home_of(model) if model.mesh is None else None
    x = x if home is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home)
    _described.lower(model, x, at, at, at).compile()


def _padded(model: Model, ids: Sequence[int], adapter: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The arguments of `_states` for one text: few lengths, so that few programs are compiled."""
    padded = np.zeros((1, bucket_length(len(ids))), np.int32)
    padded[0, : len(ids)] = ids
    return padded, np.array([len(ids)], np.int32), np.array([adapter], np.int32) if model.adapters else None


@jax.jit
def _states(
    model: Model, ids: Int[Array, "B T"], lengths: Int[Array, "B"], adapters: Int[Array, "B"] | None = None
) -> Float[Array, "B T D"]:
    positions = positions_of(model.config, ids.shape, start=jnp.zeros_like(lengths), length=lengths)
    with adapter_rows(adapters):
        return model.hidden_states(ids, positions)


@jax.jit
def _described(
    model: Model, x: Float[Array, "B T D"], rows: Int[Array, "N"], at: Int[Array, "N"], targets: Int[Array, "N"]
) -> Scores:
    return score(model.head(x[rows, at][None])[0], targets)


@jax.jit
def _scored(
    model: Model, x: Float[Array, "B T D"], rows: Int[Array, "N"], at: Int[Array, "N"], targets: Int[Array, "N"]
) -> tuple[Float[Array, "N"], Bool[Array, "N"]]:
    logits = model.head(x[rows, at][None])[0]
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return target - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets
