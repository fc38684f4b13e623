"""The next token from logits, with bias and penalties: greedy, or drawn from what temperature, top-k, top-p, min-p and
XTC leave.

Dims: B batch, V vocabulary, K likeliest tokens that are described.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from minicpm_data.generation.options import IN_ANSWER, MOST_BIASED, MOST_LOGPROBS, MOST_SPECIAL, Sampling

COLDEST = 1e-6  # temperature; logits divided by less overflow float32
HOTTEST = 1e38  # more overflows float32; either way all tokens are equally likely
NUMBERS = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "min_tokens_to_keep",
    "biased_tokens",
    "biases",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "xtc_probability",
    "xtc_threshold",
    "xtc_special_tokens",
]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*NUMBERS, "scored"],
    meta_fields=["greedy", "penalized"],
)
@dataclass(frozen=True)
class SamplingParams:
    """`Sampling` as inputs of a compiled program, [B, 1] if rows differ. Only whether any row samples and whether
    any row may have penalties or a bias are static.

    ``greedy`` of None serves every kind of sampling with one program: the device looks whether any row samples.
    """

    temperature: Float[Array, ""] | Float[Array, "B 1"]
    top_p: Float[Array, ""] | Float[Array, "B 1"]
    top_k: Int[Array, ""] | Int[Array, "B 1"]
    min_p: Float[Array, ""] | Float[Array, "B 1"]
    min_tokens_to_keep: Int[Array, ""] | Int[Array, "B 1"]
    biased_tokens: Int[Array, "M"] | Int[Array, "B 1 M"]  # filled up with the size of the vocabulary
    biases: Float[Array, "M"] | Float[Array, "B 1 M"]
    repetition_penalty: Float[Array, ""] | Float[Array, "B 1"]
    frequency_penalty: Float[Array, ""] | Float[Array, "B 1"]
    presence_penalty: Float[Array, ""] | Float[Array, "B 1"]
    xtc_probability: Float[Array, ""] | Float[Array, "B 1"]
    xtc_threshold: Float[Array, ""] | Float[Array, "B 1"]
    xtc_special_tokens: Int[Array, "N"] | Int[Array, "B 1 N"]  # filled up with the size of the vocabulary
    greedy: bool | None
    penalized: bool
    scored: Bool[Array, "B"] | None = None  # rows whose tokens get `Scores`; None: no program computes them

    @staticmethod
    def of(sampling: Sampling, vocab_size: int) -> "SamplingParams":
        special = np.full(MOST_SPECIAL, vocab_size, np.int32)
        special[: len(sampling.xtc_special_tokens or ())] = sampling.xtc_special_tokens or ()
        biased, biases = np.full(MOST_BIASED, vocab_size, np.int32), np.zeros(MOST_BIASED, np.float32)
        for place, pair in enumerate(sampling.bias):
            biased[place], biases[place] = pair
        return SamplingParams(
            np.float32(min(max(sampling.temperature, COLDEST), HOTTEST)),
            np.float32(sampling.top_p),
            np.int32(min(sampling.top_k or vocab_size, vocab_size)),
            np.float32(sampling.min_p),
            np.int32(min(sampling.min_tokens_to_keep, vocab_size)),
            biased,
            biases,
            np.float32(sampling.repetition_penalty),
            np.float32(sampling.frequency_penalty),
            np.float32(sampling.presence_penalty),
            np.float32(sampling.xtc_probability),
            np.float32(sampling.xtc_threshold),
            special,
            sampling.greedy,
            sampling.penalized,
        )

    @staticmethod
    def of_rows(
        samplings: Sequence[Sampling], vocab_size: int, scored: Sequence[bool] | None = None
    ) -> "SamplingParams":
        """The parameters of rows that differ, for the one program that serves every kind of sampling. Penalties and
        biases that are none change no bit of the logits."""
        each = [SamplingParams.of(sampling, vocab_size) for sampling in samplings]
        numbers = {name: np.stack([getattr(params, name) for params in each])[:, None] for name in NUMBERS}
        wanted = np.zeros(len(samplings), bool) if scored is None else np.array(scored, bool)
        return SamplingParams(**numbers, greedy=None, penalized=True, scored=wanted)


def sample(
    logits: Float[Array, "B V"], token_counts: Int[Array, "B V"] | None, params: SamplingParams, keys: Array
) -> Int[Array, "B"]:
    """One token for each row.

    ``token_counts``: from `count_tokens`, where rows are penalized. ``keys``: [B] random keys."""
    if params.penalized and token_counts is not None:
        logits = penalized(logits, token_counts, params)
    likeliest = jnp.argmax(logits, axis=-1)
    if params.greedy:
        return likeliest

    def drawn():
        kept = filtered(logits / params.temperature, params)
        # Under a condition, so that a first request with XTC needs no program of its own.
        kept = jax.lax.cond(
            jnp.any(params.xtc_probability > 0), lambda: without_top_choices(logits, kept, params, keys), lambda: kept
        )
        token = jax.vmap(jax.random.categorical)(keys, kept)
        return jnp.where(jnp.ravel(params.temperature) <= COLDEST, likeliest, token)

    if params.greedy is None:
        return jax.lax.cond(jnp.any(params.temperature > COLDEST), drawn, lambda: likeliest)
    return drawn()


def penalized(
    logits: Float[Array, "B V"], token_counts: Int[Array, "B V"], params: SamplingParams
) -> Float[Array, "B V"]:
    """The logits with bias, repetition penalty, frequency penalty and presence penalty, in this order."""

    def changed() -> Array:
        rows = len(logits)
        tokens = jnp.broadcast_to(params.biased_tokens, (rows, 1, MOST_BIASED))[:, 0]
        biases = jnp.broadcast_to(params.biases, (rows, 1, MOST_BIASED))[:, 0]
        biased = logits.at[jnp.arange(rows)[:, None], tokens].add(biases, mode="drop")
        repeated = jnp.where(biased > 0, biased / params.repetition_penalty, biased * params.repetition_penalty)
        answered = token_counts // IN_ANSWER
        taken = params.frequency_penalty * answered + params.presence_penalty * (answered > 0)
        return jnp.where(token_counts > 0, repeated, biased) - taken

    others = (params.frequency_penalty != 0) | (params.presence_penalty != 0) | (params.repetition_penalty != 1)
    # Most batches have none of them.
    return jax.lax.cond(jnp.any(others) | jnp.any(params.biases != 0), changed, lambda: logits)


class Scores(NamedTuple):
    """How likely tokens are: their log probabilities, and ids and log probabilities of the likeliest."""

    logprob: Float[Array, "B"]
    ids: Int[Array, "B K"]
    logprobs: Float[Array, "B K"]


def score(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Scores:
    """How likely the tokens are, by the model's own logits."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    likeliest, ids = jax.lax.top_k(logprobs, min(MOST_LOGPROBS, logits.shape[-1]))
    return Scores(jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0], ids.astype(jnp.int32), likeliest)


def no_scores(rows: int, vocab_size: int) -> Scores:
    """Zeros in place of `Scores`."""
    shape = rows, min(MOST_LOGPROBS, vocab_size)
    return Scores(jnp.zeros(rows), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))


def only_allowed(logits: Float[Array, "B V"], allowed: UInt32[Array, "B W"]) -> Float[Array, "B V"]:
    """-inf for every token whose bit in ``allowed`` is 0; bit i % 32 of word i // 32 is that of token i."""

    def masked() -> Array:
        bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)

    # Most batches have no constraint, and the mask of all tokens took a tenth of a step on a CPU.
    return jax.lax.cond(jnp.all(allowed == jnp.uint32(0xFFFFFFFF)), lambda: logits, masked)


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
    some = jax.lax.cond(
        jnp.any(params.min_tokens_to_keep > 1),
        lambda: (
            ordered >= _cut(ordered, lambda above: jnp.sum(above, axis=-1, keepdims=True) >= params.min_tokens_to_keep)
        ),
        lambda: jnp.zeros(ordered.shape, bool),
    )
    likely = some | (probabilities >= params.min_p * likeliest)
    return jnp.where(kept & (ordered >= _cut(ordered, enough)) & likely, logits, -jnp.inf)


def without_top_choices(
    logits: Float[Array, "B V"], kept: Float[Array, "B V"], params: SamplingParams, keys: Array
) -> Float[Array, "B V"]:
    """XTC: ``kept`` (from `filtered`) with -inf, at random, for all tokens above a threshold but the least likely one.

    The probabilities are those of ``logits`` at temperature 1, as in `mlx_lm`. Its parts are in the order of
    `mlx_lm.sample_utils.apply_xtc`; each row has its own chance.
    """
    probabilities = jax.nn.softmax(jnp.where(kept == -jnp.inf, -jnp.inf, logits), axis=-1)
    above = jnp.where(probabilities > params.xtc_threshold, probabilities, jnp.inf)
    rows = len(logits)
    special = jnp.broadcast_to(params.xtc_special_tokens, (rows, 1, MOST_SPECIAL))[:, 0]
    spared = jnp.zeros(logits.shape, bool).at[jnp.arange(rows)[:, None], special].set(True, mode="drop")
    excluded = (probabilities > jnp.min(above, axis=-1, keepdims=True)) & ~spared
    chance = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys)
    applied = chance[:, None] < params.xtc_probability
    return jnp.where(excluded & applied, -jnp.inf, kept)


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
