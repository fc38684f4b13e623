"""Optimizers by name, with weight decay for matrices, and muP's parameter groups."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax.contrib

from minicpm_data.training.options import is_decayed
from minicpm_jax.training.step import Weights
from weights_io.config import ModelConfig
from weights_io.parameters import parameters

Mask = Callable[[Weights], Any]  # weights -> whether each array is decayed


def _decayed(config: ModelConfig) -> Mask:
    def name(path: Any) -> str:
        return ".".join(part.key for part in path)

    return functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: is_decayed(name(path), config))


def _muon(decay: float, decayed: Mask) -> optax.GradientTransformation:
    """Muon for the layers' matrices (stacked, [L, out, in]); Adam for everything else: embedding, head, norms,
    experts."""
    axes = functools.partial(jax.tree.map, lambda w: optax.contrib.MuonDimensionNumbers(2, 1))
    muon = optax.contrib.muon(1.0, muon_weight_dimension_numbers=axes)
    labels = functools.partial(jax.tree.map, lambda w: "muon" if w.ndim == 3 else "adam")
    updates = optax.partition({"muon": muon, "adam": optax.adam(1.0)}, labels)
    return optax.chain(updates, optax.add_decayed_weights(-decay, mask=decayed))  # the updates are negated already


OPTIMIZERS: dict[str, Callable[[float, Mask], optax.GradientTransformation]] = {
    "adamw": lambda decay, decayed: optax.adamw(1.0, weight_decay=decay, mask=decayed),
    "adam": lambda decay, decayed: optax.adam(1.0),
    "sgd": lambda decay, decayed: optax.sgd(1.0),
    "adafactor": lambda decay, decayed: optax.adafactor(1.0),
    "muon": _muon,
}


def mup_optimizer(
    config: ModelConfig, beta1: float, beta2: float, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW whose updates are for a learning rate of 1. Matrices get muP's fraction of it (arXiv 2404.06395, table
    7) and weight decay; norms and the embedding get all of it and no decay."""
    table = {p.name: p for p in parameters(config)}
    shares = {name: p.learning_rate_scale(config) for name, p in table.items()}
    matrices = {name: p.init == "matrix" for name, p in table.items()}
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(beta1, beta2),
        optax.add_decayed_weights(weight_decay, mask=matrices),
        optax.stateless(lambda updates, _: {name: -shares[name] * update for name, update in updates.items()}),
    )


@functools.cache
def optimizer(name: str, weight_decay: float, clip: float, config: ModelConfig) -> optax.GradientTransformation:
    """One of `OPTIMIZERS` for a learning rate of 1, with gradients clipped to the norm ``clip``. The same arguments
    return the same object, so `train_step` compiles once."""
    return optax.chain(optax.clip_by_global_norm(clip), OPTIMIZERS[name](weight_decay, _decayed(config)))
