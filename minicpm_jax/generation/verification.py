"""The programs of speculation in an engine: guesses for all rows, and their verification.

Rejecting guesses is free: a row's length is set back, and later tokens overwrite what is beyond it. A row may lack the
pages of guesses that it does not make: their keys go into page 0, which is nobody's.

Dims: B rows, K guesses, W = K + 1, T tokens, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from minicpm_data.generation.guessing import PROPOSED
from minicpm_data.generation.options import IN_ANSWER
from minicpm_jax.generation.decoding import State, sample_next
from minicpm_jax.generation.sampling import SamplingParams, Scores
from minicpm_jax.layers.kv_cache import Cache
from minicpm_jax.model import Model


@functools.partial(jax.jit, donate_argnames="state")
def verify_rows(
    model: Model,
    state: State,
    given: Int[Array, "B K"],
    proposed: Int[Array, "B K"] | None,
    params: SamplingParams,
    forced: Int[Array, "W B"],
    allowed: UInt32[Array, "B V/32"],
) -> tuple[State, Int[Array, "W B"], Int[Array, "B"], Scores | None]:
    """Run the last token of each row and its guesses through the model.

    Arguments:
        given, forced: as in `guessing.Plan`.
        proposed: the draft model's guesses.
        allowed: the tokens that may come next. It is right for the first one, and rows that have a grammar no guess.

    Returns the state after each row's accepted guesses and one further token, the token sampled after each input, the
    number of accepted guesses, and the scores of the tokens.
    """
    guesses = given if proposed is None else jnp.where(given == PROPOSED, proposed, given)
    ids = jnp.concatenate([state.token[:, None], jnp.maximum(guesses, 0)], axis=1)
    (rows, width), before = ids.shape, state.cache.lengths
    lengths = before[:, None] + 1 + jnp.arange(width)  # at each token, as in plain decoding
    hidden, cache = model.decode(ids, state.cache, width, length=lengths)

    def choose(state, given):
        logits, now = given
        state = sample_next(state, logits, params, now, allowed)
        return state, dataclasses.replace(state, token_counts=None)

    nothing: Any = None  # the cache is not carried through the scan
    logits = model.head(hidden).swapaxes(0, 1)  # [W, B, V]
    _, states = jax.lax.scan(choose, dataclasses.replace(state, cache=nothing), (logits, forced))
    right = jnp.sum(jnp.cumprod(guesses == states.token[:-1].T, axis=1), axis=1)
    row = jnp.arange(rows)
    accepted = jnp.arange(width)[:, None] <= right
    seen, token_counts = jnp.where(accepted, states.token, model.config.vocab_size), state.token_counts
    token_counts = None if token_counts is None else token_counts.at[row, seen].add(IN_ANSWER, mode="drop")
    after = State(
        dataclasses.replace(cache, lengths=jnp.where(state.finished, before, before + right + 1)),
        states.token[right, row],
        token_counts,
        states.rng[right, row],
        states.finished[right, row],
        state.eos_ids,
        jax.tree.map(lambda each: each[right, row], states.scores),
    )
    return after, states.token, right, states.scores


@functools.partial(jax.jit, static_argnames="count", donate_argnames="cache")
def propose_rows(
    model: Model, cache: Cache, last: Int[Array, "B T"], start: Int[Array, "B"], count: int
) -> tuple[Cache, Int[Array, "B K"]]:
    """The ``count`` greedy tokens after each row's text, whose ``last`` tokens begin at position ``start``."""
    lengths = start[:, None] + 1 + jnp.arange(last.shape[1])
    hidden, cache = model.decode(last, dataclasses.replace(cache, lengths=start), last.shape[1], length=lengths)

    def likeliest(hidden):
        return jnp.argmax(model.head(hidden[:, -1:])[:, 0], axis=-1).astype(jnp.int32)

    def step(carry, _):
        cache, token = carry
        hidden, cache = model.decode(token[:, None], cache, 1)
        return (cache, likeliest(hidden)), token

    (cache, token), tokens = jax.lax.scan(step, (cache, likeliest(hidden)), length=count - 1)
    return cache, jnp.concatenate([tokens, token[None]]).T
