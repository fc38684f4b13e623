"""The slots of an engine: a request that has been prefilled gets one, and gives it up.

Dims: B slots.
"""

import dataclasses
import functools

import jax
from jaxtyping import Array, Int

from minicpm_jax.generation.decoding import State

ENDS = 8  # end-of-text ids checked on the device; the host checks the rest, a few steps later


@functools.partial(jax.jit, donate_argnames="state")
def insert(state: State, row: State, slot: Int[Array, ""], length: Int[Array, ""]) -> State:
    """Put a one-row state without a cache into a slot, whose table names pages with ``length`` tokens."""

    def write(stored, new):
        at = (slot,) + (0,) * (stored.ndim - 1)
        return jax.lax.dynamic_update_slice(stored, new.astype(stored.dtype), at)

    rng = write(jax.random.key_data(state.rng), jax.random.key_data(row.rng))
    return State(
        dataclasses.replace(state.cache, lengths=state.cache.lengths.at[slot].set(length)),
        write(state.token, row.token),
        write(state.token_counts, row.token_counts),
        jax.random.wrap_key_data(rng),
        write(state.finished, row.finished),
        write(state.eos_ids, row.eos_ids),
        jax.tree.map(write, state.scores, row.scores),
    )


@functools.partial(jax.jit, donate_argnames="state")
def vacate(state: State, slot: Int[Array, ""]) -> State:
    """Empty a slot: its row is finished, and no attention looks at its pages."""
    cache = dataclasses.replace(state.cache, lengths=state.cache.lengths.at[slot].set(0))
    return dataclasses.replace(state, cache=cache, finished=state.finished.at[slot].set(True))
