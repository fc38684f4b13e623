"""One optimiser step on a dictionary of arrays, and the muP groups of the parameter table."""

import functools
from typing import Any

import jax
import optax

from minicpm_jax.losses import packed_loss
from minicpm_jax.model import Model, nested
from weights_io.config import ModelConfig
from weights_io.parameters import parameters

Weights = dict[str, jax.Array]  # parameter name -> array, float32 masters


def optimizer(
    config: ModelConfig, beta1: float, beta2: float, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW whose updates are for a learning rate of 1: matrices get muP's share of it (arXiv 2404.06395, table 7) and
    weight decay, norms and embedding the whole and none."""
    table = {p.name: p for p in parameters(config)}
    shares = {name: p.learning_rate_scale(config) for name, p in table.items()}
    matrices = {name: p.init == "matrix" for name, p in table.items()}
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(beta1, beta2),
        optax.add_decayed_weights(weight_decay, mask=matrices),
        optax.stateless(lambda updates, _: {name: -shares[name] * update for name, update in updates.items()}),
    )


@functools.partial(jax.jit, static_argnames=("config", "optimiser", "bos_token_id", "dtype", "remat"), donate_argnums=0)
def pretrain_step(
    state: tuple[Weights, Any],
    windows: jax.Array,
    learning_rate: jax.Array,
    *,
    config: ModelConfig,
    optimiser: optax.GradientTransformation,
    bos_token_id: int,
    dtype: str,
    remat: bool,
) -> tuple[tuple[Weights, Any], dict[str, jax.Array]]:
    """One AdamW step on [B, T] windows, computed in ``dtype`` over float32 masters. Returns the state and figures."""
    weights, moments = state

    def loss_of(weights: Weights) -> jax.Array:
        model = Model(nested({name: w.astype(dtype) for name, w in weights.items()}), config)
        return packed_loss(model, windows, bos_token_id, remat)

    loss, gradients = jax.value_and_grad(loss_of)(weights)
    updates, moments = optimiser.update(gradients, moments, weights)
    weights = {name: w + learning_rate * updates[name] for name, w in weights.items()}
    return (weights, moments), {"loss": loss, "gradient_norm": optax.global_norm(gradients)}


@functools.partial(jax.jit, static_argnames=("config", "bos_token_id", "dtype"))
def packed_evaluation(weights: Weights, windows: jax.Array, *, config: ModelConfig, bos_token_id: int, dtype: str):
    """Loss of [B, T] windows without a step."""
    model = Model(nested({name: w.astype(dtype) for name, w in weights.items()}), config)
    return packed_loss(model, windows, bos_token_id)


def weights_of(model: Model) -> Weights:
    """The model's arrays under the names of the parameter table."""
    return {p.name: functools.reduce(getattr, p.name.split("."), model)[...] for p in parameters(model.config)}
