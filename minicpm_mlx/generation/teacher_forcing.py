"""Logits of a given text, computed as generation does: as a whole, in chunks, token by token."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from minicpm_mlx.model import Model


def logits(model: "Model", ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """[B, T, V] logits of ids [B, T]."""
    return np.asarray(model(ids, mask))


def states(model: "Model", ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings and each layer's output [L + 1, T, D], and the states after the final norm [T, D], of ids [1,
    T]."""
    import mlx.core as mx

    from minicpm_mlx.layers.rope import positions_of

    positions = positions_of(model.config, mx.array(ids))
    x = [model.model.embed(mx.array(ids))]
    for layer in model.layers:
        x.append(layer(x[-1], positions)[0])
    return np.concatenate([to_float32(state) for state in x]), to_float32(model.model.norm(x[-1]))[0]


def continued(model: "Model", prompts: list[np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """[B, N, V]: the logits from which each of the tokens [B, N] is chosen when they follow the prompts through a
    cache."""
    import mlx.core as mx
    from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.stack([np.pad(prompt, (lengths.max() - len(prompt), 0)) for prompt in prompts])
    cache = make_prompt_cache(model)
    if len(prompts) > 1:
        cache = [BatchKVCache((lengths.max() - lengths).tolist()) for _ in cache]
    x = model.decode(mx.array(ids), cache)
    steps = [to_float32(model.head(x[:, -1:]))]
    for token in tokens.T[:-1]:
        x = model.decode(mx.array(token[:, None]), cache)
        steps.append(to_float32(model.head(x)))
    return np.concatenate(steps, axis=1)


def to_float32(x) -> np.ndarray:
    import mlx.core as mx

    return np.asarray(x.astype(mx.float32))
