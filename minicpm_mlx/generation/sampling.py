"""Sample the next token from logits, with bias and penalties: greedy, or randomly with temperature, top-k, top-p, min-p
and XTC.

Dims: B batch, V vocabulary, K likeliest tokens that are described.
"""

from typing import NamedTuple

import mlx.core as mx

from minicpm_data.generation.options import IN_ANSWER, MOST_LOGPROBS, Sampling

COLDEST = 1e-6  # temperature; logits divided by less overflow float32


def sample(logits: mx.array, token_counts: mx.array | None, sampling: Sampling, keys: mx.array | None) -> mx.array:
    """One token [B] for each row of ``logits`` [B, V].

    ``token_counts`` [B, V]: from `count_tokens`, where rows are penalized. ``keys`` [B, 2]: random keys, or None to
    take the likeliest token."""
    if token_counts is not None:
        logits = penalized(logits, token_counts, sampling)
    if sampling.greedy or keys is None:
        return mx.argmax(logits, axis=-1)
    kept = filtered(logits / max(sampling.temperature, COLDEST), sampling)
    if sampling.excludes:
        kept = without_top_choices(logits, kept, sampling, keys)
    return mx.stack([mx.random.categorical(row, key=key) for row, key in zip(kept, keys, strict=True)])


def penalized(logits: mx.array, token_counts: mx.array, sampling: Sampling) -> mx.array:
    """The logits with bias, repetition penalty, frequency penalty and presence penalty, in this order."""
    if sampling.bias:
        tokens, biases = zip(*sampling.bias, strict=True)
        logits = logits.at[:, mx.array(tokens)].add(mx.array(biases))
    penalty = sampling.repetition_penalty
    logits = mx.where(token_counts > 0, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
    answered = token_counts // IN_ANSWER
    return logits - (sampling.frequency_penalty * answered + sampling.presence_penalty * (answered > 0))


class Scores(NamedTuple):
    """How likely tokens are: their log probabilities [B], and ids and log probabilities [B, K] of the likeliest."""

    logprob: mx.array
    ids: mx.array
    logprobs: mx.array


def score(logits: mx.array, tokens: mx.array) -> Scores:
    """How likely the tokens [B] are, by the model's own logits [B, V]."""
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ids = mx.argsort(-logprobs, axis=-1)[:, : min(MOST_LOGPROBS, logits.shape[-1])]
    likeliest = mx.take_along_axis(logprobs, ids, axis=-1)
    return Scores(mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0], ids, likeliest)


def filtered(logits: mx.array, sampling: Sampling) -> mx.array:
    """-inf for every token outside top-k, then top-p, then min-p; each filter is a threshold on the logits.
    `mlx_lm`'s samplers filter before they divide by the temperature; transformers and the JAX twin filter
    afterwards."""
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return logits
    size = logits.shape[-1]
    descending = -mx.sort(-logits, axis=-1)
    rank = mx.arange(size)
    in_top_k = rank < min(sampling.top_k or size, size)
    probabilities = mx.softmax(mx.where(in_top_k, descending, -mx.inf), axis=-1, precise=True)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    # A token is kept while the likelier ones do not reach top_p by themselves; the likeliest is always kept.
    likely = (probabilities >= sampling.min_p * probabilities[:, :1]) | (rank < sampling.min_tokens_to_keep)
    stays = (before < sampling.top_p) & likely & in_top_k
    lowest = mx.min(mx.where(stays, descending, mx.inf), axis=-1, keepdims=True)
    return mx.where(logits >= lowest, logits, -mx.inf)


def without_top_choices(logits: mx.array, kept: mx.array, sampling: Sampling, keys: mx.array) -> mx.array:
    """XTC: ``kept`` (from `filtered`) with -inf, at random, for all tokens above a threshold but the least likely one.

    The probabilities are those of ``logits`` at temperature 1, as in `mlx_lm`. Its parts are in the order of
    `mlx_lm.sample_utils.apply_xtc`, which has one chance for all rows; here each row has its own."""
    probabilities = mx.softmax(mx.where(kept == -mx.inf, -mx.inf, logits), axis=-1, precise=True)
    above = mx.where(probabilities > sampling.xtc_threshold, probabilities, mx.inf)
    excluded = probabilities > mx.min(above, axis=-1, keepdims=True)
    if sampling.xtc_special_tokens:
        excluded[:, mx.array(sampling.xtc_special_tokens)] = mx.array(False)
    chance = mx.stack([mx.random.uniform(key=mx.random.split(key)[1]) for key in keys])
    return mx.where(excluded & (chance[:, None] < sampling.xtc_probability), -mx.inf, kept)
