"""Activation sparsity: the fraction of the MLP's neurons that ReLU or FATReLU sets to 0.

The output of the gate's activation is counted, before the product with up, as in ProSparse (arXiv 2402.13516).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minicpm_data.diagnostics.sparsity import checked_threshold
from minicpm_data.generation.request import prompt_ids
from minicpm_jax.generation.decoding import bucket_length, empty
from minicpm_jax.layers.kv_cache import Cache
from minicpm_jax.layers.linear import Linear
from minicpm_jax.layers.ops import gated_act
from minicpm_jax.layers.rope import positions_of
from minicpm_jax.model import Model
from minicpm_jax.parallel.mesh import with_model_mesh

PIECE = 512  # tokens per call


class Counting:
    """The gate's projection, which also counts the zeros after the activation."""

    def __init__(self, gate_proj: Linear, neurons: int, threshold: float):
        self.gate_proj, self.neurons, self.threshold = gate_proj, neurons, threshold

    def __call__(self, x: Float[Array, "1 T D"]) -> Float[Array, "1 T F"]:
        gate = self.gate_proj(x)
        own = gate[..., : self.neurons]  # a mesh may have padded them
        self.zeros = jnp.sum(gated_act(own, jnp.ones_like(own), self.threshold) == 0, axis=(0, 2))  # [T]
        return gate


def activation_sparsity(model: Model, ids: Sequence[int]) -> np.ndarray:
    """The activation sparsity of each layer on a text.

    Arguments:
        model: a dense model whose activation is ReLU or FATReLU.
        ids: the token ids of one text.

    Returns: [L], the fraction of each layer's neurons that are 0 after the activation, over all tokens.

    Raises: `InputError` if the activation is never 0 (SiLU), if the model has experts, and for empty or invalid ids.
    """
    checked_threshold(model.config)
    tokens = np.array([prompt_ids(None, ids, model.config.vocab_size)], np.int32)
    length = tokens.shape[1]
    width = min(bucket_length(length), PIECE)
    tokens = np.pad(tokens, [(0, 0), (0, -length % width)])
    cache, _ = empty(model, 1, tokens.shape[1], None)
    zeros = np.zeros(model.config.num_hidden_layers, np.int64)
    for start in range(0, length, width):
        piece = tokens[:, start : start + width]
        found, cache = _zeros(model, piece, cache, np.int32(min(width, length - start)), np.int32(length))
        zeros += np.asarray(found)
    return zeros / (length * model.config.intermediate_size)


@functools.partial(jax.jit, donate_argnames="cache")
@with_model_mesh
def _zeros(
    model: Model, ids: Int[Array, "1 T"], cache: Cache, new: Int[Array, ""], length: Int[Array, ""]
) -> tuple[Int[Array, "L"], Cache]:
    """Number of zero neurons of each layer over the first ``new`` tokens, and the cache with those tokens."""
    positions = positions_of(model.config, ids.shape, start=cache.lengths, length=length[None])
    real = jnp.arange(ids.shape[1]) < new

    def step(carry, layer):
        weights, index = layer
        neurons, mlp = model.config.intermediate_size, weights.mlp
        gate = mlp.gate_proj = Counting(mlp.gate_proj, neurons, mlp.threshold)
        x, cache, _ = weights(carry[0], positions, carry[1], index)
        return (x, cache), gate.zeros @ real

    depth = model.config.num_hidden_layers
    (_, cache), zeros = jax.lax.scan(step, (model.model.embed(ids), cache), (model.model.layers, jnp.arange(depth)))
    return zeros, dataclasses.replace(cache, lengths=cache.lengths + new)
