"""A stack of layers and how it runs.

The layers are stacked on axis 0 (every leaf has a leading axis L) and scanned, so the program is only one layer
long. A list of unstacked layers runs itself (`cpu.form.Layers`).
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
from minicpm_jax.parallel.activations import ADDED_UP, gather_then_shard_sequence, replicate_per_device, shard_sequence
from minicpm_jax.parallel.mesh import ambient_mesh

Ran = tuple[Float[Array, "B T D"], Cache | None, Float[Array, ""]]  # hidden state, cache, load-balancing loss


def run_layers(
    layers: Any, x: Float[Array, "B T D"], positions: Positions, cache: Cache | None = None, remat: bool = False
) -> Ran:
    """Run x through all layers.

    Returns the hidden state, the cache and the mean of the layers' `moe.load_balancing_loss`. ``remat``: recompute
    each layer in the backward pass instead of storing its activations.
    """
    if isinstance(layers, nnx.List):
        return layers.run_layers(x, positions, cache)  # type: ignore[attr-defined]
    if cache is None:
        x = gather_then_shard_sequence(x)
        layers = replicate_norm_weights(layers, x)

    def step(carry, layer):
        x, cache = carry
        weights, index = layer
        x, cache, aux_loss = weights(x if cache is not None else shard_sequence(x), positions, cache, index)
        return (x, cache), aux_loss

    if remat:  # the saved sums take 0.7 GB of 4.8 for MiniCPM-1B over fsdp, tensor
        step = jax.checkpoint(step, policy=jax.checkpoint_policies.save_only_these_names(ADDED_UP))
    depth = jax.tree.leaves(layers)[0].shape[0]
    (x, cache), each = jax.lax.scan(step, (x, cache), (layers, jnp.arange(depth)))
    return x, cache, jnp.mean(each)


class PerDeviceWeight(OwnProduct):
    """A norm's weight [D] as [P, Q, D], a copy per device of the ambient mesh (`activations.replicate_per_device`)."""

    def times(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """x times the weight, elementwise; each device uses its own copy."""
        weight = self.weight[...]
        rows, tokens, width = weight.shape
        parts = x.reshape(rows, len(x) // rows, tokens, -1, width)
        return (parts * weight[:, None, :, None]).reshape(x.shape)


def replicate_norm_weights(layers: Any, x: Float[Array, "B T D"]) -> Any:
    """Replicate the norm weights of stacked layers per device of the ambient mesh. Their gradients are then summed
    over the devices once, not in every layer."""
    if ambient_mesh() is None:
        return layers

    def own(part: Any) -> Any:
        if type(part) is not RMSNorm:  # a norm inside of attention, where all devices of tensor have all tokens
            return part
        norm = RMSNorm(part.weight[...], part.eps)
        norm.weight = PerDeviceWeight(nnx.Param(replicate_per_device(part.weight[...], x)))
        return norm

    return jax.tree.map(own, layers, is_leaf=lambda part: isinstance(part, RMSNorm))
