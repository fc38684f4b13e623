"""Logits of a given text, computed as generation does: as a whole, in chunks, token by token."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from minicpm_jax.model import Model


def logits(model: "Model", ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """[B, T, V] logits of ids [B, T]."""
    return np.asarray(model(ids, mask))


def states(model: "Model", ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings and each layer's output [L + 1, T, D], and the states after the final norm [T, D], of ids [1,
    T]."""
    import jax

    x, last = jax.jit(_states)(model, ids)
    return to_float32(x[:, 0]), to_float32(last[0])


def continued(model: "Model", prompts: list[np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """[B, N, V]: the logits from which each of the tokens [B, N] is chosen when they follow the prompts through a
    cache."""
    import jax

    from minicpm_jax.generation.decoding import empty

    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.stack([np.pad(prompt, (0, lengths.max() - len(prompt))) for prompt in prompts])
    cache, _ = empty(model, len(prompts), int(lengths.max()) + tokens.shape[1], None)
    x, cache = jax.jit(decoded)(model, ids, cache, lengths)
    steps = [to_float32(x)[np.arange(len(ids)), lengths - 1][:, None]]
    for token in tokens.T[:-1]:
        x, cache = jax.jit(decoded)(model, token[:, None], cache, 1)
        steps.append(to_float32(x))
    return np.concatenate(steps, axis=1)


def _states(model, ids):
    import jax
    import jax.numpy as jnp

    from minicpm_jax.layers.rope import positions_of
    from minicpm_jax.parallel.mesh import use_mesh

    positions = positions_of(model.config, ids.shape)
    x = model.model.embed(ids)
    with use_mesh(model.mesh):
        last, after = jax.lax.scan(lambda x, layer: (layer(x, positions)[0],) * 2, x, model.model.layers)
    return jnp.concatenate([x[None], after]), model.model.norm(last)


def decoded(model, ids, cache, new):
    """Logits of more tokens, and the updated cache."""
    x, cache = model.decode(ids, cache, new)
    return model.head(x), cache


def to_float32(x) -> np.ndarray:
    return np.asarray(x).astype(np.float32)
