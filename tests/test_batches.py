"""Batches of examples: packing, rows of like length, and an order that a number decides."""

import random
from collections import Counter

import numpy as np
import pytest

from minicpm_data.datasets.batches import Batches, best_fit, evaluation_batches, one_of_few
from minicpm_data.datasets.examples import IGNORED, Example, Pair
from weights_io.errors import InputError


def example(length, number=0):
    """The second half is trained. Ids tell the example and the position."""
    ids = 1000 * number + 1 + np.arange(length, dtype=np.int32)
    return Example(ids, np.arange(length) >= length // 2)


def skewed(count, limit=512, seed=0):
    """Most are short, a few long, as answers are."""
    rng = random.Random(seed)
    lengths = [min(limit, 4 + int(rng.lognormvariate(3.5, 1.0))) for _ in range(count)]
    return [example(length, number) for number, length in enumerate(lengths)]


def contents(batch):
    """The ids of each example in a batch, by number of the example."""
    found = []
    for ids, labels, segments in zip(batch.ids, batch.labels, batch.segments, strict=True):
        for number in range(1, segments.max(initial=0) + 1):
            here = segments == number
            found.append((ids[here].tolist(), labels[here].tolist()))
    return found


def seen(batches):
    return Counter(ids[0] // 1000 for batch in batches for ids, _ in contents(batch))


def assert_equal(one, other):
    for name in ("ids", "labels", "segments", "index"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or np.array_equal(a, b), name


def test_a_batch_position_by_position():
    batch = Batches([example(3), example(5, 1)], 2, 64, seed=0)[0]
    assert batch.ids.shape == batch.labels.shape == batch.segments.shape == (2, 32)
    assert batch.ids.dtype == batch.labels.dtype == batch.segments.dtype == np.int32
    short, long = np.argsort(batch.segments.sum(1))
    assert batch.ids[short].tolist() == [1, 2, 3] + [0] * 29
    assert batch.labels[short].tolist() == [-100, 2, 3] + [-100] * 29
    assert batch.segments[short].tolist() == [1] * 3 + [0] * 29
    assert batch.labels[long].tolist() == [-100, -100, 1003, 1004, 1005] + [-100] * 27
    assert batch.tokens == batch.trained == 5 and batch.index is None


def test_a_packed_batch_position_by_position():
    everything = Example(np.array([7, 8], np.int32), np.array([True, True]))
    batch = Batches([example(3), example(4, 1), everything], 1, 10, seed=0, pack=True)[0]
    assert batch.ids.tolist() == [[1001, 1002, 1003, 1004, 1, 2, 3, 7, 8, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 2, 2, 2, 3, 3, 0]]
    # The 7, though marked, is predicted by the last token of another example.
    assert batch.labels.tolist() == [[-100, -100, 1003, 1004, -100, 2, 3, -100, 8, -100]]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("count", "batch_size"), [(96, 8), (1200, 4), (40, 40)])
def test_an_epoch_holds_each_example_once(pack, count, batch_size):
    examples = skewed(count, limit=64) if not pack else [example(64, number) for number in range(count)]
    batches = Batches(examples, batch_size, 64, seed=1, pack=pack)
    assert batches.per_epoch == count // batch_size
    for epoch in range(3):
        numbers = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        assert seen(batches[n] for n in numbers) == dict.fromkeys(range(count), 1)
    first, second = (batches[n].ids[:, :4].tolist() for n in (0, batches.per_epoch))
    assert first != second


def test_where_the_batch_size_does_not_divide_an_epochs_last_batch_is_filled_up():
    """After 8 epochs each of the 100 examples has been seen 8 times."""
    examples = skewed(100, limit=64)
    batches = Batches(examples, 8, 64, seed=1)
    assert batches.per_epoch == 13
    assert set(seen(batches[n] for n in range(13))) == set(range(100))
    assert seen(batches[n] for n in range(100)) == dict.fromkeys(range(100), 8)


def test_examples_stay_whole():
    examples = skewed(300)
    for pack in (False, True):
        for ids, labels in contents(Batches(examples, 8, 512, seed=0, pack=pack)[0]):
            whole = examples[ids[0] // 1000]
            assert ids == whole.ids.tolist()
            assert labels == np.where(whole.trained, whole.ids, IGNORED).tolist()


@pytest.mark.parametrize("pack", [False, True])
def test_a_batch_is_a_function_of_seed_and_number(pack):
    examples = skewed(300)
    batches = Batches(examples, 4, 512, seed=5, pack=pack)
    forwards = [batches[n] for n in range(90)]
    for n in (77, 3, 40):
        assert_equal(Batches(examples, 4, 512, seed=5, pack=pack)[n], forwards[n])
        assert_equal(batches[n], forwards[n])
    other = Batches(examples, 4, 512, seed=6, pack=pack)
    assert any(not np.array_equal(other[n].ids, forwards[n].ids) for n in range(3))
    with pytest.raises(IndexError):
        batches[-1]


@pytest.mark.parametrize("pack", [False, True])
def test_processes_make_the_rows_of_one_batch(pack):
    batches = Batches(skewed(300), 8, 512, seed=5, pack=pack)
    for n in (0, 5, 50):
        whole, parts = batches[n], [batches.part(n, lambda rows, p=p: range(p, rows, 4)) for p in range(4)]
        assert {(part.size, part.length) for part in parts} == {(8, np.count_nonzero(whole.segments))}
        for p, part in enumerate(parts):
            for name in ("ids", "labels", "segments"):
                assert np.array_equal(getattr(part, name), getattr(whole, name)[p::4])


def test_widths():
    batches = Batches(skewed(300, limit=500), 4, 500, seed=0)
    widths = [batches[n].ids.shape[1] for n in range(batches.per_epoch)]
    assert all(width % 32 == 0 or width == 500 for width in widths) and len(set(widths)) > 3
    assert widths != sorted(widths)  # the order of lengths is no order of training
    for n in range(10):
        longest = int((batches[n].segments > 0).sum(1).max())
        assert longest <= batches[n].ids.shape[1] < longest + 32


@pytest.mark.parametrize("pack", [False, True])
def test_the_batches_of_a_step_are_one_large_batch(pack):
    """So that a step's rows are of like length, however many batches it takes."""
    large, small = (
        Batches(skewed(300), 16 // n, 512, seed=2, pack=pack, accumulation=n, row_width=one_of_few) for n in (1, 4)
    )
    for step in (0, 7, 30):
        parts = [small[4 * step + n] for n in range(4)]
        for name in ("ids", "labels", "segments"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(large[step], name))
    assert small.padding == large.padding
    assert len(Batches(skewed(10), 4, 512, seed=0, accumulation=8)[5].ids) == 4  # a step is more than there are


def test_widths_of_which_there_are_few():
    assert [one_of_few(n) for n in (1, 32, 33, 49, 65, 96, 97, 1100)] == [32, 32, 48, 64, 96, 96, 128, 1536]
    assert Batches([example(1100), example(5)], 1, 1200, seed=0, pack=True, row_width=one_of_few)[0].ids.shape == (
        1,
        1200,
    )


def measured_padding(batches):
    epoch = [batches[n] for n in range(batches.per_epoch)]
    return 1 - sum(np.count_nonzero(b.segments) for b in epoch) / sum(b.segments.size for b in epoch)


def test_padding():
    """Rows of like length waste less than rows in random order, and packed rows less still."""
    examples = skewed(2048)
    order = random.Random(0).sample(examples, len(examples))
    widths = [-(-max(e.length for e in order[at : at + 8]) // 32) * 32 for at in range(0, len(order), 8)]
    unsorted = 1 - sum(e.length for e in examples) / (8 * sum(widths))
    bucketed, packed = (Batches(examples, 8, 512, seed=0, pack=pack) for pack in (False, True))
    assert measured_padding(bucketed) == pytest.approx(bucketed.padding)
    assert measured_padding(packed) == pytest.approx(packed.padding)
    assert unsorted > 0.5 and 0.1 < bucketed.padding < 0.3 and packed.padding < 0.05, (
        unsorted,
        bucketed.padding,
        packed.padding,
    )


def test_best_fit():
    rows = best_fit([5, 5, 3, 7, 10, 2], 10)
    assert sorted(sorted(row) for row in rows) == [[0, 1], [2, 3], [4], [5]]
    lengths = [e.length for e in skewed(1000)]
    rows = best_fit(lengths, 512)
    assert sorted(i for row in rows for i in row) == list(range(1000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 512
    assert len(rows) <= sum(lengths) / 512 * 1.05
    assert best_fit([], 10) == []


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("count", [1, 50, 64])
def test_evaluation_sees_every_example_once(pack, count):
    examples = skewed(count)
    batches = [*evaluation_batches(examples, 8, 512, pack)]
    assert seen(batches) == dict.fromkeys(range(count), 1)
    assert {len(batch.ids) for batch in batches} == {8}
    for batch in batches:
        empty = batch.segments.sum(1) == 0
        assert not batch.ids[empty].any() and (batch.labels[empty] == IGNORED).all()
    for one, other in zip(batches, evaluation_batches(examples, 8, 512, pack), strict=True):
        assert_equal(one, other)
    if not pack:
        assert len(batches) == -(-count // 8)


def pairs(count):
    rng = random.Random(0)
    return [Pair(example(rng.randrange(4, 60), n), example(rng.randrange(4, 60), n)) for n in range(count)]


def test_pairs():
    data = pairs(24)
    batches = Batches(data, 4, 64, seed=0)
    found = []
    for n in range(batches.per_epoch):
        batch = batches[n]
        assert batch.ids.shape[0] == 8 and batch.index.tolist() == (batch.ids[:4, 0] // 1000).tolist()
        for row, i in enumerate(batch.index):
            for at, part in ((row, data[i].chosen), (row + 4, data[i].rejected)):
                assert batch.ids[at][batch.segments[at] == 1].tolist() == part.ids.tolist()
        found += batch.index.tolist()
        part = batches.part(n, lambda rows: range(rows // 2, rows))  # of the rejected answers
        assert part.trained == batch.trained == batch.tokens > part.tokens
        assert part.index.tolist() == batch.index.tolist() and np.array_equal(part.ids, batch.ids[4:])
    assert sorted(found) == list(range(24))
    assert measured_padding(batches) == pytest.approx(batches.padding)
    with pytest.raises(InputError, match="pairs cannot be packed"):
        Batches(data, 4, 64, seed=0, pack=True)


def test_evaluation_of_pairs():
    batches = [*evaluation_batches(pairs(10), 4, 64)]
    assert [batch.ids.shape[0] for batch in batches] == [8, 8, 8]
    index = np.concatenate([batch.index for batch in batches])
    assert sorted(index.tolist()) == [-1, -1, *range(10)]
    partial = next(batch for batch in batches if -1 in batch.index)
    assert not partial.segments[np.tile(partial.index, 2) == -1].any()


def test_refusals():
    data = [example(8, n) for n in range(6)]
    with pytest.raises(InputError, match="6 examples do not fill one batch of 8; give --batch-size 6 or less"):
        Batches(data, 8, 64, seed=0)
    with pytest.raises(InputError, match="6 examples, packed into 1 rows, do not fill .* --batch-size 1, or more"):
        Batches(data, 2, 64, seed=0, pack=True)
    with pytest.raises(InputError, match="seed -1"):
        Batches(data, 2, 64, seed=-1)
    with pytest.raises(InputError, match="8 tokens, more than the 7"):
        Batches(data, 2, 7, seed=0)
    with pytest.raises(InputError, match="batch_size 0"):
        Batches(data, 0, 64, seed=0)
