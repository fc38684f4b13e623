"""`minicpm_data.generation.engine` on the batch generator of `mlx_lm`, whose caches grow and shrink.

A prompt is prefilled in a cache of its own, which then joins the batch. The caches of finished requests are kept for
prompts with a common prefix.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import trim_prompt_cache

from minicpm_data.generation import engine
from minicpm_data.generation.constraint import Matcher, unpacked
from minicpm_data.generation.engine import RequestState, shared
from minicpm_data.generation.options import PLAIN_CACHE, CacheOptions, Sampling, seen_tokens
from minicpm_data.generation.thinking import Thought
from minicpm_mlx import device
from minicpm_mlx.generation import decoding
from minicpm_mlx.generation.sampling import penalized, sample
from minicpm_mlx.layers.fused_linear import fuse
from minicpm_mlx.model import Model
from weights_io.errors import InputError

ENDLESS = 2**31  # max_tokens of the batch generator: our engine counts tokens itself


class Engine(engine.BatchEngine[Model]):
    def __init__(
        self,
        model: Model,
        slots: int = 8,
        context: int | None = None,
        cache_options: CacheOptions = PLAIN_CACHE,
    ):
        super().__init__(model, slots, context, cache_options)
        if cache_options.kv_bits is not None:
            raise InputError("is for one prompt at a time in MLX; leave it out for an engine.", option="kv_bits")
        fuse(model)
        mx.eval(model.parameters())  # lazy weights can only be read by the loading thread
        self.batch = BatchGenerator(model, completion_batch_size=slots, prefill_batch_size=slots)
        self.numbers: dict[int, int] = {}  # the batch generator's uid -> request number
        # Finished requests and their caches: at most one per slot, together at most one context's tokens.
        self.kept: deque[tuple[RequestState, list[Any]]] = deque(maxlen=slots)

        def needed(context: int) -> int:
            """Bytes of all requests' caches, of the kept ones and of the prompt in prefill."""
            return decoding.cache_bytes(model, slots + 2, context, cache_options)

        self._check_room(needed, device.free_memory(model))

    def _run(self, state: RequestState) -> Iterator[None]:
        request, prompt, cache = state.request, list(state.prompt), self._begun(state)
        begun, width = cache[0].offset, request.cache.prefill_step_size
        for start in range(begun, len(prompt) - 1, width):
            if start > begun:
                yield
            part = prompt[start : min(start + width, len(prompt) - 1)]
            decoding.prefill_chunks(self.model, mx.array([part]), cache, len(part), len(prompt))
        draw, processors = choosers(request.sampling, prompt, self.model.config.vocab_size)
        processors += [] if state.matcher is None else [holding(state.matcher)]
        processors += [] if state.thought is None else [forcing(state.thought)]
        (uid,) = self.batch.insert(
            [prompt[-1:]],
            [ENDLESS],
            caches=[cache],
            all_tokens=[prompt[:-1]],
            samplers=[draw],
            logits_processors=[processors],
        )
        self.numbers[uid] = state.number

    def _begun(self, state: RequestState) -> list[Any]:
        """A cache that already holds the longest prefix which the prompt shares with a kept text."""
        lengths = [shared(self.model.config, state.prompt, old) for old, _ in self.kept]
        if not any(lengths):
            return decoding.make_cache(self.model, [0], self.cache_options)
        best = int(np.argmax(lengths))
        cache = copy.deepcopy(self.kept[best][1])
        trim_prompt_cache(cache, cache[0].offset - lengths[best])
        return cache

    def _decode(self, steps: int) -> list[tuple[int, int]]:
        _, made = self.batch.next()
        return [(self.numbers[each.uid], each.token) for each in made]

    def _free(self, state: RequestState) -> None:
        uid = next(uid for uid, number in self.numbers.items() if number == state.number)
        cache, _ = self.batch.remove([uid], return_prompt_caches=True)[uid]
        del self.numbers[uid]
        self.kept.append((state, cache))
        while sum(cache[0].offset for _, cache in self.kept) > self.context:
            self.kept.popleft()


Draw = Callable[[mx.array], mx.array]  # log-probabilities [1, V] -> a token [1]
Processor = Callable[[mx.array, mx.array], mx.array]  # tokens so far, logits [1, V] -> logits


def choosers(sampling: Sampling, prompt: list[int], vocab_size: int) -> tuple[Draw | None, list[Processor]]:
    """The sampler and logits processors with which `mlx_lm` samples as `decoding.sample_next` does. A sampler of None
    is greedy, batched over all such rows."""
    key, token_mask = mx.array(sampling.row_keys(1)[0]), mx.array(seen_tokens([prompt], vocab_size))

    def draw(logits: mx.array) -> mx.array:
        nonlocal key
        both = mx.random.split(key)
        key = both[0]
        return sample(logits, None, sampling, both[1:])

    def penalise(context: mx.array, logits: mx.array) -> mx.array:
        nonlocal token_mask
        token_mask = mx.put_along_axis(token_mask, context[-1:][None], mx.array(True), axis=1)
        return penalized(logits, token_mask, sampling)

    return None if sampling.greedy else draw, [penalise] if sampling.penalized else []


def forcing(thought: Thought) -> Processor:
    """The logits processor that takes the forced tokens of a thinking budget. It waits for each token of the thought,
    and for none of the answer."""
    begun = False

    def force(context: mx.array, logits: mx.array) -> mx.array:
        nonlocal begun
        if begun and not thought.over:
            found: Any = context[-1].item()
            thought.add(found)
        begun = True
        if not thought.forced:
            return logits
        return mx.where(mx.arange(logits.shape[-1]) == thought.forced[0], mx.zeros_like(logits), -mx.inf)

    return force


def holding(matcher: Matcher) -> Processor:
    """The logits processor of a constraint. It waits for each token."""
    begun = False

    def hold(context: mx.array, logits: mx.array) -> mx.array:
        nonlocal begun
        if begun:
            matcher.add(int(context[-1].item()))  # type: ignore[arg-type]  # a token
        begun = True
        return mx.where(mx.array(unpacked(matcher.allowed(), logits.shape[-1])), logits, -mx.inf)

    return hold
