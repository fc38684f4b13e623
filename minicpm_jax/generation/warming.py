"""Compile the programs of the next question of a chat while the user reads and types.

A conversation grows by an answer and a question at a time, so the next prompt often has another bucket length.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_data.generation import api
from minicpm_data.generation.image_prompt import penalized_ids
from minicpm_data.generation.options import count_tokens
from minicpm_data.generation.request import GenerationRequest, PromptIds
from minicpm_data.generation.thinking import Thoughts
from minicpm_jax import device
from minicpm_jax.cpu.form import form_of_model
from minicpm_jax.generation import decoding
from minicpm_jax.generation.programs import Key, Programs
from minicpm_jax.generation.sampling import SamplingParams
from minicpm_jax.generation.shapes import Places
from minicpm_jax.layers.kv_cache import Cache
from minicpm_jax.model import Model

QUESTIONS = (8, 64, 256)  # tokens of the questions that are prepared for, with the template's


class Warming(api.Warming[Model]):
    """The programs of one chat. A model over a mesh is not warmed: XLA chooses where its results are."""

    def __init__(self, model: Model):
        self.model = model
        self._programs = Programs(self._compiled)
        self._request: GenerationRequest | None = None  # the latest, for what does not follow from the sizes
        self._places: Places | None = None

    def claim(self, request: GenerationRequest) -> None:
        began = time.perf_counter()
        self._programs.claim(keys_of(request))
        device.count_compiling(time.perf_counter() - began)

    def follow(self, request: GenerationRequest, answer: int) -> None:
        if self.model.mesh is not None:
            return
        self._request, self._places = request, Places(self.model)
        said = len(request.prompt) + answer
        self._programs.warm(key for more in QUESTIONS for key in keys_of(request, said + more))

    def close(self) -> None:
        self._programs.close()

    def _compiled(self, key: Key) -> object:
        """The compiled program of a key."""
        request, places, model = self._request, self._places, self.model
        assert request is not None and places is not None
        if key.name == "empty":
            return decoding.empty.lower(model, 1, key.sizes[0], request.cache.kv_bits).compile()
        if key.name == "prefill":
            (width, slots), number = key.sizes, jax.ShapeDtypeStruct((), jnp.int32)
            ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, width), (1,)))
            return decoding.prefill.lower(model, ids, *self._row(request, places, slots), number, lengths).compile()
        first = self._first(request, places, key.sizes[0])
        if key.name == "first_token":
            return decoding.first_token.lower(model, *first).compile()
        state = jax.eval_shape(decoding.first_token, model, *first)
        state = jax.tree.map(lambda x: places.array(x.shape, x.dtype), state)
        forced, number = Thoughts(request.thinking).forced(decoding.STEPS), jax.ShapeDtypeStruct((), jnp.int32)
        return decoding.decode.lower(model, state, number, first[-2], forced).compile()

    def _row(self, request: GenerationRequest, places: Places, slots: int) -> tuple[Any, Any]:
        """The cache of a prompt, and the hidden state of its last token."""
        model = self.model
        dtype, bits = form_of_model(model).cache_dtype(model), request.cache.kv_bits
        cache = jax.eval_shape(lambda: Cache.empty(model.config, 1, slots, dtype, bits, model.mesh))
        return places.cache(cache), places.hidden()

    def _first(self, request: GenerationRequest, places: Places, slots: int) -> tuple[Any, ...]:
        """The arguments of `decoding.first_token` after the model."""
        sampling, vocab_size = request.sampling, self.model.config.vocab_size
        ends = np.array(sorted(request.end_ids) or [-1], np.int32)
        counted = map(penalized_ids, request.prompts)
        token_counts = count_tokens([*counted], vocab_size) if sampling.penalized else None
        params = SamplingParams.of(sampling, vocab_size)
        forced = Thoughts(request.thinking).forced(1)
        row = *self._row(request, places, slots), token_counts, sampling.row_keys(1), ends
        return *row, params, None if forced is None else forced[0]


def keys_of(request: GenerationRequest, length: int | None = None) -> list[Key]:
    """The programs of a request, in the order in which they run; of one like it with a prompt of ``length`` tokens."""
    if length is not None:
        whole = PromptIds((0,) * length, 1)
        request = dataclasses.replace(request, prompts=(whole,), prefix=None)
    slots = decoding.cache_length(request)
    width = decoding.prefill_chunk(request.longest - request.begun, request.cache)
    sampling = request.sampling
    kind = sampling.greedy, sampling.penalized, len(request.end_ids), request.thinking is not None
    sampled = (slots, *map(int, kind))
    prefill = Key("prefill", (width, slots))
    return [Key("empty", (slots,)), prefill, Key("first_token", sampled), Key("decode", sampled)]
