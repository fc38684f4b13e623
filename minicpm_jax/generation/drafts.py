"""The draft model of an engine.

It has a pool of as many pages as the engine's, and a request's pages hold the keys of both models. So prompts that
begin alike share those of the draft model too, and no page is counted twice. Where its cache holds less than the text,
what is missing is run before the next guess.

Dims: B rows, K guesses, W pages of a table.
"""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minicpm_data.generation.options import CacheOptions
from minicpm_data.generation.request import text_ids
from minicpm_data.generation.request_state import RequestState
from minicpm_jax.generation import decoding
from minicpm_jax.generation.programs import Key
from minicpm_jax.generation.shapes import Shapes
from minicpm_jax.generation.verification import propose_rows
from minicpm_jax.model import Model

LAST = 2  # tokens that it runs before it guesses: the last accepted guess may not have been run, and the token after it


class Drafts:
    """The draft model of an engine."""

    NAMES = ("draft prefill", "propose")  # of its programs

    def __init__(
        self, model: Model, count: int, cache_options: CacheOptions, slots: int, sizes: tuple[int, int, int], chunk: int
    ):
        """
        Arguments:
            model: the draft model.
            count: K.
            cache_options, slots: of the engine.
            sizes: pages of its pool, tokens of a page, pages of a table.
            chunk: tokens of the narrow chunk.
        """
        decoding.check_kind(model, slots, cache_options)
        self.model, self.count, self._slots, self._sizes, self._chunk = model, count, slots, sizes, chunk
        self.shapes = Shapes(model, cache_options, *sizes)
        self.cache = self.shapes.placed(self.shapes.empty(slots).cache, self.shapes.state(slots).cache)
        # Tokens at the beginning of a request's text whose keys are in the draft model's pages.
        self._held: weakref.WeakKeyDictionary[RequestState, int] = weakref.WeakKeyDictionary()
        self._whole = np.zeros(sizes[0], bool)  # pages that hold them all

    @property
    def needed(self) -> list[Key]:
        return [Key("draft prefill", (self._chunk,)), Key("propose", (self.count,))]

    def lowered(self, key: Key) -> Any:
        """The traced program of a key."""
        number = jax.ShapeDtypeStruct((), jnp.int32)
        if key.name == "propose":
            last, start = ((self._slots, LAST), (self._slots,))
            given = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (last, start))
            return propose_rows.lower(self.model, self.shapes.state(self._slots).cache, *given, self.count)
        ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, *key.sizes), (1,)))
        return decoding.prefill.lower(self.model, ids, *self.shapes.row, number, lengths, ids)

    def begin(self, state: RequestState) -> None:
        """A request got its pages, of which some are shared."""
        assert state.row is not None
        pages, shared = state.row.pages, state.row.shared
        self._whole[pages[shared:]] = False
        own = next((i for i, page in enumerate(pages[:shared]) if not self._whole[page]), shared)
        self._held[state] = own * self._sizes[1]

    def fill(self, state: RequestState, upto: int, chunk: int) -> None:
        """Run what is missing of the first ``upto`` tokens of a request, ``chunk`` tokens at a time."""
        text, start, row = state.text, self._held.get(state, 0), state.row
        assert row is not None
        table = np.zeros((1, self._sizes[2]), np.int32)
        table[0, : len(row.pages)] = row.pages
        while start < upto:
            ids, part = np.zeros((1, chunk), np.int32), text_ids(text[start : min(start + chunk, upto)])
            ids[0, : len(part)] = part
            own = dataclasses.replace(self.cache, table=table, lengths=np.array([start], np.int32))
            last = np.zeros((1, 1, self.model.config.hidden_size), self.model.model.norm.weight.dtype)
            scaled = np.maximum(len(state.prompt), start + np.arange(chunk, dtype=np.int32) + 1)[None]
            given = self.shapes.placed((own, last), self.shapes.row)
            cache, _ = decoding.prefill(self.model, ids, *given, np.int32(start), np.array([upto], np.int32), scaled)
            self._keep(self.cache.with_pool(cache))
            start += len(part)
        self._held[state] = max(start, upto)
        self.mark(state)

    def propose(
        self, rows: Sequence[RequestState | None], tables: Int[np.ndarray, "B W"], chunk: Callable[[int], int]
    ) -> Array:
        """[B, K] guesses. ``chunk``: tokens of a chunk, where so many are missing."""
        last, start = np.zeros((len(rows), LAST), np.int32), np.zeros(len(rows), np.int32)
        for slot, state in enumerate(rows):
            if state is not None:
                text = state.text
                start[slot], last[slot] = len(text) - LAST, text[-LAST:]
                missing = int(start[slot]) - self._held.get(state, 0)
                if missing > 0:
                    self.fill(state, int(start[slot]), chunk(missing))
        cache = dataclasses.replace(self.cache, table=tables.copy())
        cache = self.shapes.placed(cache, self.shapes.state(len(rows)).cache)
        cache, guesses = propose_rows(self.model, cache, last, start, self.count)
        self._keep(cache)
        return guesses

    def accept(self, state: RequestState, right: int) -> None:
        """``right`` guesses after the text were accepted, and the last guess was never run."""
        self._held[state] = len(state.text) + min(right, self.count - 1)

    def mark(self, state: RequestState) -> None:
        """Note which pages of a request are whole, before others share them."""
        assert state.row is not None
        pages, full = state.row.pages, self._held.get(state, 0) // self._sizes[1]
        self._whole[pages[:full]] = True
        self._whole[pages[max(full, state.row.shared) :]] = False

    def _keep(self, cache: Any) -> None:
        self.cache = self.shapes.placed(cache, self.shapes.state(self._slots).cache)
