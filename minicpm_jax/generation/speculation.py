"""Speculative decoding of one row: `minicpm_data.generation.speculation` on the programs of `decoding`.

Rejecting guesses is free: the cache's length is set back, and later tokens overwrite what is beyond it.

Dims: K guesses, W = K + 1, S cache slots, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minicpm_data.generation.options import MOST
from minicpm_data.generation.request import GenerationRequest, PromptIds, text_ids
from minicpm_data.generation.speculation import Draft, PromptLookup, Speculation, speculate
from minicpm_jax.generation import decoding
from minicpm_jax.generation.decoding import ROOM, State, bucket_length, sample_next
from minicpm_jax.generation.sampling import SamplingParams
from minicpm_jax.layers.kv_cache import Cache
from minicpm_jax.model import Model
from minicpm_jax.parallel.processes import fetch


@functools.partial(jax.jit, donate_argnames="state")
def verify(
    model: Model,
    state: State,
    guesses: Int[Array, "K"],
    params: SamplingParams,
    forced: Int[Array, "W"] | None = None,
) -> tuple[State, Int[Array, "W"], Int[Array, ""]]:
    """Run the last token and the guesses (-1: no guess) through the model. ``forced`` as in `sample_next`, after each.

    Returns the state after the accepted guesses and one further token, the token sampled after each input, and the
    number of accepted guesses.
    """
    ids = jnp.concatenate([state.token, jnp.maximum(guesses, 0)])[None]
    before = state.cache.lengths
    hidden, cache = model.decode(ids, state.cache, ids.shape[1], length=_lengths(before, ids.shape[1]))

    def choose(state, given):
        logits, now = given
        state = sample_next(state, logits, params, now)
        return state, state

    logits = model.head(hidden).swapaxes(0, 1)  # [W, 1, V]
    nothing: Any = None  # the cache is not carried through the scan
    each = None if forced is None else forced[:, None]
    _, states = jax.lax.scan(choose, dataclasses.replace(state, cache=nothing), (logits, each))
    tokens = states.token[:, 0]
    right = jnp.sum(jnp.cumprod(tokens[:-1] == guesses))
    after = jax.tree.map(lambda x: x[right], states)
    return dataclasses.replace(after, cache=dataclasses.replace(cache, lengths=before + right + 1)), tokens, right


@functools.partial(jax.jit, static_argnames="count", donate_argnames="cache")
def propose(
    model: Model, cache: Cache, last: Int[Array, "1 T"], start: Int[Array, ""], count: int
) -> tuple[Cache, Int[Array, "K"]]:
    """The ``count`` greedy tokens after a text whose ``last`` tokens begin at position ``start``."""
    start = start[None]
    length = _lengths(start, last.shape[1])
    hidden, cache = model.decode(last, dataclasses.replace(cache, lengths=start), last.shape[1], length=length)

    def likeliest(hidden):
        return jnp.argmax(model.head(hidden[:, -1:])[0, 0]).astype(jnp.int32)

    def step(carry, _):
        cache, token = carry
        hidden, cache = model.decode(token[None, None], cache, 1)
        return (cache, likeliest(hidden)), token

    (cache, token), tokens = jax.lax.scan(step, (cache, likeliest(hidden)), length=count - 1)
    return cache, jnp.append(tokens, token)


def _lengths(start: Int[Array, "1"], width: int) -> Int[Array, "1 W"]:
    """The length at each token, as in plain decoding: dynamic NTK and LongRoPE depend on it."""
    return start[:, None] + 1 + jnp.arange(width)


def draft_of(request: GenerationRequest, speculation: Speculation[Model]) -> Draft:
    """Guesses of a draft model. It always proposes the full number, because another number would be another program."""
    model, count = speculation.draft_model, speculation.num_draft_tokens
    assert model is not None
    prompts = (PromptIds(text_ids(request.prompt), model.config.vocab_size),)  # a draft model need not see
    own = dataclasses.replace(reserve_guesses(request, count), prompts=prompts, prefix=None)  # of the other model
    cache, _ = decoding.prefill_prompts(model, own)

    def proposed(last: Sequence[int], start: int, wanted: int) -> list[int]:
        nonlocal cache
        if start + len(last) + count > cache.slots:
            cache = decoding.resize_cache(cache, bucket_length(cache.slots + ROOM))
        cache, found = propose(model, cache, np.array([last], np.int32), np.int32(start), count)
        return fetch(found)[:wanted].tolist()

    return Draft(request.prompt, proposed)


def reserve_guesses(request: GenerationRequest, guesses: int) -> GenerationRequest:
    """The request with room in the cache for ``guesses`` tokens beyond its answer."""
    return dataclasses.replace(request, max_tokens=min(request.max_tokens + guesses, MOST))


def stream_speculated(
    model: Model, request: GenerationRequest, speculation: Speculation[Model]
) -> Iterator[tuple[int, bool]]:
    """`minicpm_data.generation.api.Decoding.stream_speculated`."""
    count = speculation.num_draft_tokens
    params = SamplingParams.of(request.sampling, model.config.vocab_size)
    state = decoding.prefill_and_sample(model, reserve_guesses(request, count))
    first, filled = int(fetch(state.token)[0]), len(request.prompt)

    def verified(guesses: Sequence[int], forced: Sequence[int] = ()) -> list[int]:
        nonlocal state, filled
        padded = np.full(count if guesses else 0, -1, np.int32)
        padded[: len(guesses)] = guesses
        if filled + 1 + len(padded) > state.cache.slots:
            state = decoding.resize_state(state, bucket_length(state.cache.slots + ROOM))
        following = None if request.thinking is None else np.full(1 + len(padded), -1, np.int32)
        if following is not None:
            following[: len(forced)] = forced[: len(following)]
        state, tokens, right = verify(model, state, padded, params, following)
        accepted = int(fetch(right)) + 1
        filled += accepted
        return fetch(tokens)[:accepted].tolist()

    guess = PromptLookup() if speculation.draft_model is None else draft_of(request, speculation)
    yield from speculate(request, first, guess, verified, count)
