"""The next token from logits: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

Dims: B batch, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from minicpm_data.generation.options import Sampling

COLDEST = 1e-6  # temperature; logits divided by less overflow float32
HOTTEST = 1e38  # more overflows float32; either way all tokens are equally likely
NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=NUMBERS,
    meta_fields=["greedy", "penalized"],
)
@dataclass(frozen=True)
class SamplingParams:
    """`Sampling` as inputs of a compiled program, [B, 1] if rows differ. Only whether any row samples and whether
    any row has a repetition penalty are static.

    ``greedy`` of None serves every kind of sampling with one program: the device looks whether any row samples.
    """

    temperature: Float[Array, ""] | Float[Array, "B 1"]
    top_p: Float[Array, ""] | Float[Array, "B 1"]
    top_k: Int[Array, ""] | Int[Array, "B 1"]
    min_p: Float[Array, ""] | Float[Array, "B 1"]
    repetition_penalty: Float[Array, ""] | Float[Array, "B 1"]
    greedy: bool | None
    penalized: bool

    @staticmethod
    def of(sampling: Sampling, vocab_size: int) -> "SamplingParams":
        return SamplingParams(
            np.float32(min(max(sampling.temperature, COLDEST), HOTTEST)),
            np.float32(sampling.top_p),
            np.int32(min(sampling.top_k or vocab_size, vocab_size)),
            np.float32(sampling.min_p),
            np.float32(sampling.repetition_penalty),
            sampling.greedy,
            sampling.penalized,
        )

    @staticmethod
    def of_rows(samplings: Sequence[Sampling], vocab_size: int) -> "SamplingParams":
        """The parameters of rows that differ, for the one program that serves every kind of sampling. A repetition
        penalty of 1 changes no bit of the logits."""
        each = [SamplingParams.of(sampling, vocab_size) for sampling in samplings]
        numbers = {name: np.stack([getattr(params, name) for params in each])[:, None] for name in NUMBERS}
        return SamplingParams(**numbers, greedy=None, penalized=True)


def sample(
    logits: Float[Array, "B V"], token_mask: Bool[Array, "B V"] | None, params: SamplingParams, keys: Array
) -> Int[Array, "B"]:
    """One token for each row.

    ``token_mask``: the tokens of prompt and answer, for the repetition penalty. ``keys``: [B] random keys."""
    if params.penalized:
        penalized = jnp.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = jnp.where(token_mask, penalized, logits)
    likeliest = jnp.argmax(logits, axis=-1)
    if params.greedy:
        return likeliest

    def drawn():
        token = jax.vmap(jax.random.categorical)(keys, filtered(logits / params.temperature, params))
        return jnp.where(jnp.ravel(params.temperature) <= COLDEST, likeliest, token)

    if params.greedy is None:
        return jax.lax.cond(jnp.any(params.temperature > COLDEST), drawn, lambda: likeliest)
    return drawn()


def filtered(logits: Float[Array, "B V"], params: SamplingParams) -> Float[Array, "B V"]:
    """-inf for every token outside top-k, then top-p, then min-p; each filter is a threshold on the logits.

    Nothing is sorted: on a CPU a sort takes 20 ms for a vocabulary of 73,440, and finding the threshold bit by bit a
    tenth of that.
    """
    ordered = _ordered(logits)
    kept = ordered >= _cut(ordered, lambda above: jnp.sum(above, axis=-1, keepdims=True) >= params.top_k)
    probabilities = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)

    def enough(above):
        mass = jnp.sum(jnp.where(above, probabilities, 0), axis=-1, keepdims=True)
        return (mass >= params.top_p) & (params.top_p < 1)

    likeliest = jnp.max(probabilities, axis=-1, keepdims=True)  # always kept
    stays = kept & (ordered >= _cut(ordered, enough)) & (probabilities >= params.min_p * likeliest)
    return jnp.where(stays, logits, -jnp.inf)


def _ordered(logits: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """The logits as unsigned integers in the same order: a float's bits, inverted for negative numbers."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _cut(
    ordered: UInt32[Array, "B V"], enough: Callable[[Bool[Array, "B V"]], Bool[Array, "B 1"]]
) -> UInt32[Array, "B 1"]:
    """The greatest threshold for which the set of numbers that reach it is ``enough``; 0 if there is none."""

    def with_bit(place, found):
        higher = found | (jnp.uint32(1 << 31) >> place.astype(jnp.uint32))
        return jnp.where(enough(ordered >= higher), higher, found)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros((len(ordered), 1), jnp.uint32))
