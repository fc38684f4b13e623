"""The slots of an engine: copying a prompt's row into one, and a beginning out of one.

Dims: L layers, B slots, R cache slots of a row.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from minicpm_jax.generation.decoding import State
from minicpm_jax.layers.kv_cache import STORED, Cache

ENDS = 8  # end-of-text ids checked on the device; the host checks the rest, a few steps later


@functools.partial(jax.jit, donate_argnames="state")
def insert(state: State, row: State, slot: Int[Array, ""]) -> State:
    """Copy a one-row state, whose cache may be shorter, into a slot."""

    def write(stored, new):
        at = (slot,) + (0,) * (stored.ndim - 1)
        return jax.lax.dynamic_update_slice(stored, new.astype(stored.dtype), at)

    def write_cache(stored, new):  # [L, B, ..]
        return None if stored is None else jax.lax.dynamic_update_slice(stored, new, (0, slot, 0, 0))

    cache, new = state.cache, row.cache
    written = {name: write_cache(getattr(cache, name), getattr(new, name)) for name in STORED}
    rng = write(jax.random.key_data(state.rng), jax.random.key_data(row.rng))
    return State(
        dataclasses.replace(cache, lengths=write(cache.lengths, new.lengths), **written),
        write(state.token, row.token),
        write(state.token_mask, row.token_mask),
        jax.random.wrap_key_data(rng),
        write(state.finished, row.finished),
        write(state.eos_ids, row.eos_ids),
    )


@functools.partial(jax.jit, static_argnames="slots")
def row_of(cache: Cache, slot: Int[Array, ""], length: Int[Array, ""], slots: int) -> Cache:
    """A one-row cache with the first ``length`` tokens of a slot."""

    def part(stored, axis):
        if stored is None:
            return None
        entries = slots // cache.grain
        more = entries - stored.shape[axis]
        begun = jax.lax.slice_in_dim(stored, 0, min(entries, stored.shape[axis]), axis=axis)
        row = jnp.take(begun, slot[None], axis=1, mode="clip")  # slicing over a mesh would communicate all rows
        return jnp.pad(row, [(0, max(more, 0) if i == axis else 0) for i in range(4)])

    arrays = {name: part(getattr(cache, name), axis) for name, axis in STORED.items()}
    return dataclasses.replace(cache, lengths=length[None], **arrays)


@jax.jit
def mark_finished(finished: Bool[Array, "B"], slot: Int[Array, ""]) -> Bool[Array, "B"]:
    """Mark the slot's row as finished."""
    return finished.at[slot].set(True)
