"""Speculative decoding: `minicpm_data.generation.speculation` on the caches of `mlx_lm`, one row at a time.

Taking back wrong guesses costs nothing: the caches are trimmed, and what lies beyond is written over.
Dims: K guesses, W = K + 1, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import trim_prompt_cache

from minicpm_data.generation.options import CacheOptions, Sampling
from minicpm_data.generation.speculation import Draft, PromptLookup, Speculation, speculate
from minicpm_mlx.generation import decoding
from minicpm_mlx.generation.decoding import State, chosen
from minicpm_mlx.layers.fused_linear import join
from minicpm_mlx.model import Model


def verify(model: Model, state: State, guesses: Sequence[int], sampling: Sampling) -> tuple[State, list[int]]:
    """Run the last token and the guesses. Returns the state after the guesses that the model agrees with and one token
    more, and the tokens that it chose."""
    ids = mx.concatenate([state.token.astype(mx.int32), mx.array(list(guesses), mx.int32)])[None]
    logits = model.head(_decode(model, ids, state.cache))  # [1, W, V]
    states = []
    for index in range(ids.shape[1]):
        state = chosen(state, logits[:, index], sampling)
        states.append(state)
    tokens = _ids([each.token for each in states])
    right = next((i for i, guess in enumerate(guesses) if guess != tokens[i]), len(guesses))
    trim_prompt_cache(state.cache, len(guesses) - right)
    return states[right], tokens[: right + 1]


def _decode(model: Model, ids: mx.array, cache: list[Any]) -> mx.array:
    """[1, T, D] of tokens that follow a text, each of which has the length of the answer that ends with it, as plain
    decoding has it: dynamic NTK takes its base."""
    return model.decode(ids, cache, cache[0].offset + 1 + mx.arange(ids.shape[1])[None])


def _ids(tokens: list[mx.array]) -> list[int]:
    """Of arrays [1]."""
    found: Any = mx.concatenate(tokens).tolist()
    return found


def draft_of(model: Model, prompt: Sequence[int], pieces: int) -> Draft:
    """Guesses of a smaller model."""
    join(model)
    cache = decoding.empty(model, [0], CacheOptions())
    decoding.run(model, mx.array([list(prompt)]), cache, pieces, len(prompt))

    def likeliest(hidden: mx.array) -> mx.array:
        token = mx.argmax(model.head(hidden[:, -1:])[:, 0], axis=-1)
        mx.async_eval(token)
        return token

    def propose(last: Sequence[int], start: int, count: int) -> list[int]:
        trim_prompt_cache(cache, cache[0].offset - start)
        found = [likeliest(_decode(model, mx.array([list(last)]), cache))]
        while len(found) < count:
            found.append(likeliest(model.decode(found[-1][None], cache)))
        return _ids(found)

    return Draft(prompt, propose)


def stream_speculated(
    model: Model,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    end_ids: frozenset[int],
    memory: CacheOptions,
    speculation: Speculation,
) -> Iterator[tuple[int, bool]]:
    """Token ids, and whether each was guessed: the tokens of `decoding.stream_tokens` for one prompt."""
    cache = decoding.empty(model, [0], memory)
    decoding.check_cache(model, 1, len(prompt), max_tokens, memory)
    return _tokens(model, prompt, max_tokens, sampling, end_ids, cache, memory.prefill_step_size, speculation)


def _tokens(
    model: Model,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    end_ids: frozenset[int],
    cache: list[Any],
    pieces: int,
    speculation: Speculation,
) -> Iterator[tuple[int, bool]]:
    count, draft = speculation.num_draft_tokens, speculation.draft_model
    with wired_limit(model, [mx.default_stream(mx.default_device())]):
        state = decoding.prefill(model, [prompt], sampling, cache, pieces)

        def verified(guesses: Sequence[int]) -> list[int]:
            nonlocal state
            state, tokens = verify(model, state, guesses, sampling)
            return tokens

        guess = PromptLookup() if draft is None else draft_of(draft, prompt, pieces)
        yield from speculate(prompt, _ids([state.token])[0], guess, verified, count, max_tokens, end_ids)
