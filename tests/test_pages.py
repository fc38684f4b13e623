"""The pool of pages: what the host keeps of a cache."""

import random

import pytest

from benchmarks.paging import simulate
from minicpm_data.generation.pages import NOBODY, PagePool
from weights_io.errors import InputError

PAGE = 4


def check(pool, rows):
    """Free, kept and held pages are all pages, each once; references are those of the rows; a key says the truth."""
    held = [page for row in rows for page in row.pages]
    assert all(pool._references[page] == held.count(page) for page in range(1, pool.pages))
    assert sorted([*pool._free, *pool._kept, *set(held)]) == list(range(1, pool.pages))
    assert NOBODY not in held and {page: key for key, page in pool._known.items()} == pool._keys
    assert pool.available == len(pool._free) + len(pool._kept) and set(pool._keys) == set(pool._serials)


@pytest.mark.parametrize("seed", range(4))
def test_pages_are_shared_named_and_given_back(seed):
    """Rows that come, grow and go at random; every page of a row holds the row's text, whoever wrote it."""
    rng, pool = random.Random(seed), PagePool(30, PAGE)
    written: dict[int, tuple[int, ...]] = {}  # what a device would hold
    rows, texts = [], []

    def write(row, text, start):
        for place in range(start, len(row.pages)):
            assert pool._references[row.pages[place]] == 1 and row.pages[place] not in pool._keys
            written[row.pages[place]] = tuple(text[place * PAGE : (place + 1) * PAGE])

    for _ in range(600):
        if rng.random() < 0.4:
            text = [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
            row = pool.take(text, spare=rng.randrange(3))
            if row is None:
                assert pool.needed(len(text)) > 0 and not pool.fits(text, spare=3)
            else:
                assert row.shared * PAGE < len(text)
                write(row, text, row.shared)
                pool.name(row, text)
                rows.append(row), texts.append(text)
        elif rows and rng.random() < 0.6:
            row, text = rng.choice(list(zip(rows, texts, strict=True)))
            more = rng.randrange(1, 6)
            if pool.needed(len(text) + more) - len(row.pages) <= pool.available:
                start = len(text) // PAGE
                pool.extend(row, pool.needed(len(text) + more))
                text += [rng.randrange(2) for _ in range(more)]
                write(row, text, start)
        elif rows:
            place = rng.randrange(len(rows))
            pool.name(rows[place], texts[place])
            pool.release(rows.pop(place)), texts.pop(place)
        check(pool, rows)
        for row, text in zip(rows, texts, strict=True):
            assert [written[page] for page in row.pages] == [
                tuple(text[i : i + PAGE]) for i in range(0, len(text), PAGE)
            ]


def test_the_beginning_of_a_text_is_shared_and_its_last_token_is_not():
    pool = PagePool(10, PAGE)
    first = pool.take(range(12))
    pool.name(first, range(12))
    for text, shared in (
        (range(12), 2),
        (range(13), 3),
        ([*range(8), 5], 2),
        ([*range(7), 9], 1),
        ([1, *range(11)], 0),
    ):
        found = pool.shared(list(text))[0]
        assert found == first.pages[:shared], text
    pool.release(first)
    assert pool.available == 9
    second = pool.take(list(range(11)))  # of a request that has ended
    assert second.pages[:2] == [1, 2] and second.shared == 2


def test_the_least_recently_used_text_goes_first_and_its_end_before_its_beginning():
    pool = PagePool(7, PAGE)
    texts = [[i] * 12 for i in range(2)]
    rows = [pool.take(text) for text in texts]
    for row, text in zip(rows, texts, strict=True):
        pool.name(row, text)
        pool.release(row)
    assert len(pool.shared([*texts[0], 0])[0]) == 3
    pool.take([7] * 8)  # two pages
    assert [len(pool.shared([*text, 0])[0]) for text in texts] == [1, 3]


def test_a_text_under_another_one_is_not_found_by_the_number_of_its_page():
    """Page numbers are given out again; a key names the text before it by a number that no other text has."""
    pool = PagePool(3, PAGE)
    first = pool.take([1] * 8)
    pool.name(first, [1] * 8)
    pool.release(first)
    second = pool.take([2] * 4)  # in the place of the second page
    pool.release(second)
    third = pool.take([3] * 8)  # and of the first
    pool.name(third, [3] * 8)
    assert pool.shared([3, 3, 3, 3, 1, 1, 1, 1, 5])[0] == third.pages[:1]


@pytest.mark.parametrize("seed", [1, 2])
def test_requests_are_seldom_interrupted_and_nobody_starves(seed):
    """The engine's scheduler without a model, in a pool for 30,870 tokens: more places than there is room for."""
    found = simulate(96, PagePool(30870 // 32 + 1, 32), 250, seed)
    assert 55 <= found["running"] < 96 and found["interruptions"] <= 0.05
    assert found["waited"] < 2000 and found["computed"] < 1.1


def test_a_pool_needs_a_page():
    with pytest.raises(InputError, match="at least one page"):
        PagePool(1, PAGE)
