"""The cache in pages: what it reads, and the kernel's numbers (interpreted), are those of a cache in rows."""

import dataclasses

import numpy as np
import pytest
from test_cache_attention import LAYER, filled, reference, updated
from test_latent_attention import filled as latents

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from minicpm_jax.layers.blockwise import blockwise_attention, blockwise_attention_in_turn  # noqa: E402
from minicpm_jax.layers.kernels.latent_prefill import latent_prefill  # noqa: E402
from minicpm_jax.layers.kernels.paged_attention import paged_attention  # noqa: E402
from minicpm_jax.layers.kernels.paged_latent import paged_latent_attention, paged_latent_prefill  # noqa: E402
from minicpm_jax.layers.kernels.paging import Paging, work_list  # noqa: E402
from minicpm_jax.layers.kernels.tiling import Tiling  # noqa: E402
from minicpm_jax.layers.kv_cache import STORED, LatentCache  # noqa: E402
from minicpm_jax.layers.paged_cache import PagedCache, PagedLatentCache  # noqa: E402

pytestmark = pytest.mark.slow


def paged(cache, page, seed=0, spare=3):
    """A cache of rows as a shuffled pool of pages of the same contents; the other pages hold nonsense."""
    layers, batch, entries, _ = cache.k.shape
    entry = page // cache.grain
    width = entries // entry
    order = 1 + np.random.default_rng(seed).permutation(batch * width + spare)[: batch * width]
    stored = {"rank": cache.rank} if isinstance(cache, LatentCache) else {}
    for name, axis in STORED.items():
        if (rows := getattr(cache, name)) is None:
            stored[name] = None
            continue
        rows = np.array(rows)
        if axis == 2:
            pages = rows.reshape(layers, batch * width, entry, -1)
        else:
            pages = rows.reshape(layers, batch, -1, width, entry).swapaxes(2, 3)
            pages = pages.reshape(layers, batch * width, -1, entry)
        pool = np.full((layers, batch * width + spare + 1, *pages.shape[2:]), 7, rows.dtype)
        pool[:, order] = pages
        stored[name] = jnp.asarray(pool)
    table = jnp.asarray(order.reshape(batch, width), jnp.int32)
    kind = PagedLatentCache if isinstance(cache, LatentCache) else PagedCache
    return kind(lengths=cache.lengths, table=table, **stored)


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


@pytest.mark.parametrize(
    ("starts", "slots", "width", "heads", "rank", "rope_dim", "bits", "page"),
    [
        ([0, 5, 63], 64, 1, 4, 128, 32, None, 32),
        ([1, 1100, 2299], 2304, 4, 5, 128, 32, 8, 128),
        ([0, 7, 30], 48, 3, 3, 20, 8, None, 16),
    ],
)
def test_latents_in_pages(starts, slots, width, heads, rank, rope_dim, bits, page):
    q, rope, cache, index = latents(starts, slots, width, heads, rank, rope_dim, bits)
    pool, both = paged(cache, page), jnp.concatenate([q, rope], axis=-1)
    wanted = np.array(blockwise_attention(both, cache, 1, index, scale=0.1))
    np.testing.assert_allclose(blockwise_attention(both, pool, 1, index, scale=0.1), wanted, atol=5e-6)
    found = paged_latent_attention(q, rope, pool, 1, index[:, 0], 0.1, interpret=True)
    np.testing.assert_allclose(found, wanted.reshape(*q.shape[:3], -1)[..., :rank], atol=5e-6)


@pytest.mark.parametrize(("starts", "slots", "width", "bits"), [([0, 30], 128, 70, None), ([100], 640, 530, 8)])
def test_the_kernel_of_prompts_over_latents_in_pages(starts, slots, width, bits):
    _, rope, cache, index = latents(starts, slots, width, 2, bits=bits)
    random = np.random.default_rng(1)
    nope = random.normal(size=(*rope.shape[:3], 64)).astype(np.float32)
    weight = (0.1 * random.normal(size=(2, 128, 128))).astype(np.float32)
    wanted = latent_prefill(nope, rope, weight, cache, jnp.int32(1), index[:, 0], interpret=True)
    found = paged_latent_prefill(nope, rope, weight, paged(cache, 128 if bits else 32), 1, index[:, 0], interpret=True)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("bits", [None, 8])
def test_latents_that_are_written_are_those_of_rows(bits):
    rng = np.random.default_rng(0)
    _, _, cache, _ = latents([0, 0, 0], 128, 1, 2, bits=bits)
    pool = paged(cache, 32)
    for start, width in (([7, 40, 0], 1), ([32, 31, 30], 50), ([126, 100, 3], 1)):
        index = jnp.asarray(start)[:, None] + jnp.arange(width)
        latent, rope_key = (rng.normal(size=(3, width, size)).astype(np.float32) for size in (128, 32))
        cache, pool = (latent_update(each, 1, latent, rope_key, index) for each in (cache, pool))
    rows = paged(cache, 32)
    for name in ("k", "k_scale") if bits else ("k",):
        np.testing.assert_array_equal(getattr(pool, name)[:, 1:], getattr(rows, name)[:, 1:])


latent_update = jax.jit(lambda cache, *given: cache.update(*given))


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
