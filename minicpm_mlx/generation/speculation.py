"""Speculative decoding: `minicpm_data.generation.speculation` on the caches of `mlx_lm`, one row at a time.

Rejecting guesses is free: the caches are trimmed, and later tokens overwrite what is beyond.

Dims: K guesses, W = K + 1, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import trim_prompt_cache

from minicpm_data.generation.options import PLAIN_CACHE, Sampling
from minicpm_data.generation.request import GenerationRequest, text_ids
from minicpm_data.generation.speculation import Draft, PromptLookup, Speculation, speculate
from minicpm_mlx.generation import decoding
from minicpm_mlx.generation.decoding import State, sample_next
from minicpm_mlx.layers.fused_linear import fuse
from minicpm_mlx.model import Model


def verify(
    model: Model, state: State, guesses: Sequence[int], sampling: Sampling, forced: Sequence[int] = ()
) -> tuple[State, list[int]]:
    """Run the last token and the guesses through the model. Returns the state after the accepted guesses and one
    further token, and those tokens. ``forced``: the ids that come first, whatever is sampled."""
    ids = mx.concatenate([state.token.astype(mx.int32), mx.array(list(guesses), mx.int32)])[None]
    logits = model.head(_decode(model, ids, state.cache))  # [1, W, V]
    states = []
    for index in range(ids.shape[1]):
        now = np.array(forced[index : index + 1]) if index < len(forced) else None
        state = sample_next(state, logits[:, index], sampling, now)
        states.append(state)
    tokens = _ids([each.token for each in states])
    right = next((i for i, guess in enumerate(guesses) if guess != tokens[i]), len(guesses))
    trim_prompt_cache(state.cache, len(guesses) - right)
    return states[right], tokens[: right + 1]


def _decode(model: Model, ids: mx.array, cache: list[Any]) -> mx.array:
    """[1, T, D] of tokens that follow the cached text. Each has the length that it has in plain decoding: dynamic
    NTK and LongRoPE depend on it."""
    return model.decode(ids, cache, cache[0].offset + 1 + mx.arange(ids.shape[1])[None])


def _ids(tokens: list[mx.array]) -> list[int]:
    """The ids in arrays [1]."""
    found: Any = mx.concatenate(tokens).tolist()
    return found


def draft_of(request: GenerationRequest, speculation: Speculation[Model]) -> Draft:
    """Guesses of a draft model with a plain cache."""
    model, prompt = speculation.draft_model, request.prompt
    assert model is not None
    fuse(model)
    cache = decoding.make_cache(model, [0], PLAIN_CACHE)
    decoding.prefill_chunks(model, mx.array([text_ids(prompt)]), cache, request.cache.prefill_step_size, len(prompt))

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
    model: Model, request: GenerationRequest, speculation: Speculation[Model]
) -> Iterator[tuple[int, bool]]:
    """`minicpm_data.generation.api.Decoding.stream_speculated`."""
    with wired_limit(model, [mx.default_stream(mx.default_device())]):
        state = decoding.prefill_and_sample(model, request)

        def verified(guesses: Sequence[int], forced: Sequence[int] = ()) -> list[int]:
            nonlocal state
            state, tokens = verify(model, state, guesses, request.sampling, forced)
            decoding.quantize_late(model, state.cache, request.cache)
            return tokens

        guess = PromptLookup() if speculation.draft_model is None else draft_of(request, speculation)
        yield from speculate(request, _ids([state.token])[0], guess, verified, speculation.num_draft_tokens)
