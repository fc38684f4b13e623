"""The next token from logits: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

Dims: B batch, V vocabulary.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minicpm_data.generation import Sampling

COLDEST = 1e-6  # temperature; logits divided by less overflow float32
HOTTEST = 1e38  # more is infinite in float32; either way all tokens are alike


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "top_k", "min_p", "repetition_penalty"],
    meta_fields=["greedy", "penalised"],
)
@dataclass(frozen=True)
class Knobs:
    """`Sampling` for a compiled program: the numbers are inputs, [B, 1] where rows differ; only whether to draw and to
    penalise (any row) recompiles."""

    temperature: Float[Array, ""] | Float[Array, "B 1"]
    top_p: Float[Array, ""] | Float[Array, "B 1"]
    top_k: Int[Array, ""] | Int[Array, "B 1"]
    min_p: Float[Array, ""] | Float[Array, "B 1"]
    repetition_penalty: Float[Array, ""] | Float[Array, "B 1"]
    greedy: bool
    penalised: bool

    @staticmethod
    def of(sampling: Sampling, vocab_size: int) -> "Knobs":
        return Knobs(
            np.float32(min(max(sampling.temperature, COLDEST), HOTTEST)),
            np.float32(sampling.top_p),
            np.int32(min(sampling.top_k or vocab_size, vocab_size)),
            np.float32(sampling.min_p),
            np.float32(sampling.repetition_penalty),
            sampling.greedy,
            sampling.penalised,
        )


def sample(logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, knobs: Knobs, keys: Array) -> Int[Array, "B"]:
    """One token for each row. ``seen``: tokens of prompt and answer, for the repetition penalty; ``keys``: [B]."""
    if knobs.penalised:
        penalised = jnp.where(logits > 0, logits / knobs.repetition_penalty, logits * knobs.repetition_penalty)
        logits = jnp.where(seen, penalised, logits)
    likeliest = jnp.argmax(logits, axis=-1)
    if knobs.greedy:
        return likeliest
    drawn = jax.vmap(jax.random.categorical)(keys, filtered(logits / knobs.temperature, knobs))
    return jnp.where(jnp.ravel(knobs.temperature) <= COLDEST, likeliest, drawn)


def filtered(logits: Float[Array, "B V"], knobs: Knobs) -> Float[Array, "B V"]:
    """-inf for every token outside top-k, then top-p, then min-p; each is a lowest logit that still passes."""
    descending = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    kept = jnp.where(rank < knobs.top_k, descending, -jnp.inf)
    probabilities = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # A token stays while the likelier ones do not reach top_p by themselves; the likeliest always stays.
    stays = (before < knobs.top_p) & (probabilities >= knobs.min_p * probabilities[:, :1]) & (rank < knobs.top_k)
    lowest = jnp.min(jnp.where(stays, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)
