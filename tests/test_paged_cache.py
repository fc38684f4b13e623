"""The cache in pages: what it reads, and the kernel's numbers (interpreted), are those of a cache in rows."""

import dataclasses

import numpy as np
import pytest
from test_cache_attention import LAYER, LAYERS, filled, reference, updated

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from minicpm_jax.layers.blockwise import blockwise_attention, blockwise_attention_in_turn  # noqa: E402
from minicpm_jax.layers.kernels.cache_attention import Tiling  # noqa: E402
from minicpm_jax.layers.kernels.paged_attention import Paging, paged_attention, work_list  # noqa: E402
from minicpm_jax.layers.kv_cache import STORED  # noqa: E402
from minicpm_jax.layers.paged_cache import PagedCache  # noqa: E402

pytestmark = pytest.mark.slow


def paged(cache, page, seed=0, spare=3):
    """A cache of rows as a shuffled pool of pages of the same keys and values; page 0 holds NaN-free nonsense."""
    layers, batch, slots, _ = cache.k.shape
    width = slots // page
    order = 1 + np.random.default_rng(seed).permutation(batch * width + spare)[: batch * width]
    stored = {}
    for name, axis in STORED.items():
        if (rows := getattr(cache, name)) is None:
            stored[name] = None
            continue
        rows = np.array(rows)
        if axis == 2:
            pages = rows.reshape(layers, batch * width, page, -1)
        else:
            pages = rows.reshape(layers, batch, -1, width, page).swapaxes(2, 3).reshape(layers, batch * width, -1, page)
        pool = np.full((layers, batch * width + spare + 1, *pages.shape[2:]), 7, rows.dtype)
        pool[:, order] = pages
        stored[name] = jnp.asarray(pool)
    return PagedCache(lengths=cache.lengths, table=jnp.asarray(order.reshape(batch, width), jnp.int32), **stored)


CASES = {  # first slot of each row's new tokens, heads, key/value heads, head dimension, new tokens, slots, page
    "one token": ([0, 5, 31, 32, 200], 4, 4, 64, 1, 256, 32),
    "grouped": ([0, 255, 63, 100], 8, 2, 128, 1, 256, 64),
    "two heads of a register": ([17, 90], 12, 4, 64, 1, 128, 16),
    "a piece": ([0, 64], 4, 4, 64, 64, 256, 32),
    "a piece that begins anywhere": ([13], 8, 2, 64, 96, 256, 32),
    "int8": ([0, 5, 127, 128, 300], 4, 4, 64, 1, 512, 128),
    "int8 piece": ([130], 8, 2, 64, 40, 512, 128),
}


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_rows(case):
    first, heads, kv_heads, head_dim, width, slots, page = CASES[case]
    q, cache = filled(first, heads, kv_heads, head_dim, width, slots, bits=8 if "int8" in case else None)
    first = np.array(first, np.int32)
    pool, index = paged(cache, page), jnp.asarray(first[:, None] + np.arange(width))
    wanted = np.array(reference(q, cache, first))
    for attention in (blockwise_attention, blockwise_attention_in_turn):
        np.testing.assert_allclose(attention(q, pool, LAYER, index), wanted, atol=2e-6)
    np.testing.assert_allclose(paged_attention(q, pool, LAYER, first, interpret=True), wanted, atol=2e-6)


@pytest.mark.parametrize("bits", [None, 8])
def test_what_is_written_is_what_rows_hold(bits):
    """A prompt in pieces and single tokens; slots beyond a table, and empty rows, change nobody's pages."""
    rng = np.random.default_rng(0)
    _, cache = filled([0, 0, 0], 4, 2, 64, 1, 128, bits=bits)
    pool = paged(cache, 32)
    before = np.array(pool.k)
    for start, width in (([7, 40, 0], 1), ([32, 32, 32], 50), ([126, 100, 3], 1)):
        index = jnp.asarray(start)[:, None] + jnp.arange(width)
        k, v = (rng.normal(size=(3, width, 2, 64)).astype(np.float32) for _ in range(2))
        cache, pool = updated(cache, LAYER, k, v, index), paged_update(pool, LAYER, k, v, index)
    rows = paged(cache, 32)
    for name in STORED:
        if getattr(pool, name) is not None:
            np.testing.assert_array_equal(getattr(pool, name)[:, 1:], getattr(rows, name)[:, 1:])
    assert not np.array_equal(before[LAYER], pool.k[LAYER])
    held = np.array(pool.k)
    k = np.ones((3, 1, 2, 64), np.float32)
    empty = dataclasses.replace(pool, table=jnp.zeros_like(pool.table))
    for which, index in ((empty, [[0], [31], [5]]), (pool, [[128], [500], [129]])):
        written = paged_update(which, LAYER, k, k, jnp.asarray(index))
        np.testing.assert_array_equal(written.k[:, 1:], held[:, 1:])


paged_update = jax.jit(PagedCache.update)


@pytest.mark.parametrize("width", [1, 700])
def test_the_work_list_has_every_block_once(width):
    rng = np.random.default_rng(1)
    tiling = Tiling.of(16, width, 8, 64, 4096, 8, 2)
    paging = Paging.of(tiling, 32)
    for _ in range(5):
        first = rng.integers(0, 4096 - width, 16).astype(np.int32)
        first[rng.integers(0, 16, 5)] = 0
        items, blocks, steps = map(np.array, work_list(paging, jnp.asarray(first)))
        wanted = [
            (row * tiling.pieces + piece, block)
            for row in range(16)
            for piece in range(tiling.pieces)
            for block in range(paging.blocks(int(first[row]), piece))
        ]
        assert list(zip(items[:steps], blocks[:steps], strict=True)) == wanted
        assert LAYERS == 3
