"""Prefill and the decode loop, on the caches of `mlx_lm`.

Prompts of unequal length are padded on the left, as `BatchKVCache` has it. The graph of a step is built and handed over
while the step before it is computed, so a token costs the device no pause.
Dims: B batch, T longest prompt, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from minicpm_data.generation import Sampling
from minicpm_mlx.model import Model
from minicpm_mlx.sampling import sample

CLEAR_EVERY = 256  # tokens after which MLX's pool of freed buffers is emptied, as the cache grows by that much


def stream_tokens(
    model: Model, prompts: Sequence[Sequence[int]], max_tokens: int, sampling: Sampling, end_ids: frozenset[int]
) -> Iterator[np.ndarray]:
    """Token ids [B], one step after the other, until every row has met an id of ``end_ids`` or ``max_tokens`` steps.
    A row that has ended goes on with tokens of no meaning."""
    with wired_limit(model):
        steps = _Steps(model, prompts, sampling)
        token = steps.first()
        ends, done = np.array(sorted(end_ids)), np.zeros(len(prompts), bool)
        for made in range(1, max_tokens + 1):
            following = steps.next(token) if made < max_tokens else token
            tokens = np.asarray(token)
            yield tokens
            done |= np.isin(tokens, ends)
            if done.all():
                return
            token = following
            if made % CLEAR_EVERY == 0:
                mx.clear_cache()


class _Steps:
    """The rows of a batch between two steps: their cache, what they have seen, and the key of their draws."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling):
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        self.model, self.sampling = model, sampling
        self.cache = make_prompt_cache(model)
        if len(prompts) > 1:
            self.cache = [BatchKVCache(padding) for _ in self.cache]
        self.ids = mx.array([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
        self.key = None if sampling.seed is None else mx.random.key(sampling.seed)
        self.seen = None
        if sampling.penalised:
            seen = np.zeros((len(prompts), model.config.vocab_size), bool)
            for row, prompt in zip(seen, prompts, strict=True):
                row[list(prompt)] = True
            self.seen = mx.array(seen)

    def first(self) -> mx.array:
        """Run the prompts and choose each row's first token [B]."""
        return self._chosen(self.model.decode(self.ids, self.cache)[:, -1:])

    def next(self, token: mx.array) -> mx.array:
        """The token [B] after ``token`` [B]."""
        return self._chosen(self.model.decode(token[:, None], self.cache))

    def _chosen(self, hidden: mx.array) -> mx.array:
        key = None
        if self.key is not None:
            self.key, key = mx.random.split(self.key)
        token = sample(self.model.head(hidden)[:, 0], self.seen, self.sampling, key)
        if self.seen is not None:
            self.seen = mx.put_along_axis(self.seen, token[:, None], mx.array(True), axis=1)
        mx.async_eval(token)
        return token
