"""A stack of layers, and how it runs.

The layers are stacked on axis 0 (every leaf has a leading axis L) and scanned, so that the program is as long as one
layer. A list of layers runs itself (`cpu.form.Layers`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from minicpm_jax.layers.kv_cache import Cache
from minicpm_jax.layers.linear import RMSNorm
from minicpm_jax.layers.ops import OwnProduct
from minicpm_jax.layers.rope import Positions
from minicpm_jax.parallel.activations import ADDED_UP, by_tokens, copies, gathered_rows
from minicpm_jax.parallel.mesh import ambient

Ran = tuple[Float[Array, "B T D"], Cache | None, Float[Array, ""]]  # what comes of layers


def through(
    layers: Any, x: Float[Array, "B T D"], positions: Positions, cache: Cache | None = None, remat: bool = False
) -> Ran:
    """x through all layers: the hidden state, the cache, and the mean of the layers' `moe.imbalance`. ``remat``:
    recompute each layer in the backward pass instead of keeping what it computed."""
    if isinstance(layers, nnx.List):
        return layers.through(x, positions, cache)  # type: ignore[attr-defined]
    if cache is None:
        x = gathered_rows(x)
        layers = _own_norms(layers, x)

    def step(carry, layer):
        x, cache = carry
        weights, index = layer
        x, cache, imbalance = weights(x if cache is not None else by_tokens(x), positions, cache, index)
        return (x, cache), imbalance

    if remat:  # what is kept are 0.7 GB of 4.8 of MiniCPM-1B over fsdp, tensor
        step = jax.checkpoint(step, policy=jax.checkpoint_policies.save_only_these_names(ADDED_UP))
    depth = jax.tree.leaves(layers)[0].shape[0]
    (x, cache), each = jax.lax.scan(step, (x, cache), (layers, jnp.arange(depth)))
    return x, cache, jnp.mean(each)


class Copies(OwnProduct):
    """A norm's weight [D] as [P, Q, D]: each device of the ambient mesh has a copy (`activations.copies`)."""

    def times(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Each number times that of its column."""
        weight = self.weight[...]
        rows, tokens, width = weight.shape
        parts = x.reshape(rows, len(x) // rows, tokens, -1, width)
        return (parts * weight[:, None, :, None]).reshape(x.shape)


def _own_norms(layers: Any, x: Float[Array, "B T D"]) -> Any:
    """The layers, stacked, with norms of which each device of the ambient mesh has `copies`: their gradients are added
    up over the devices once, not in every layer."""
    if ambient() is None:
        return layers

    def own(part: Any) -> Any:
        if not isinstance(part, RMSNorm):
            return part
        norm = RMSNorm(part.weight[...], part.eps)
        norm.weight = Copies(nnx.Param(copies(part.weight[...], x)))
        return norm

    return jax.tree.map(own, layers, is_leaf=lambda part: isinstance(part, RMSNorm))
