"""Examples to batches: whole examples packed into rows or rows of like length, in an order that a number decides."""

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minicpm_data.datasets.examples import IGNORED, Example, Own, Pair
from weights_io.errors import InputError

MULTIPLE = 32  # of which widths are multiples
BUCKET = 32  # steps whose rows are sorted by length together
MEASURED = 512  # steps of the first epoch over which the padding is counted

Row = list[int]  # the examples that share a row; [] is an empty row


def multiple(width: int) -> int:
    """The least multiple of 32 that holds ``width``."""
    return -(-width // MULTIPLE) * MULTIPLE


def one_of_few(width: int) -> int:
    """The least of 32, 48, 64, 96, 128, ... that holds ``width``: for a backend that compiles a program for each."""
    power = max(MULTIPLE, 1 << (width - 1).bit_length())
    return power * 3 // 4 if power > MULTIPLE and width <= power * 3 // 4 else power


@dataclass(frozen=True)
class Batch:
    """Rows of one width. B is the batch size; of pairs 2 B: the chosen ones, then the rejected ones in the same order.
    A row of nothing but padding is an empty row. Where several processes train, each has its own rows alone."""

    ids: np.ndarray  # [B, T] int32
    labels: np.ndarray  # [B, T] int32: the token itself where it is a target, else -100; position t - 1 predicts t
    segments: np.ndarray  # [B, T] int32: 1, 2, ... number the examples of a row, 0 is padding
    size: int  # B, of all processes
    length: int  # tokens in the rows of all processes, trained or not
    index: np.ndarray | None = None  # [B] int32, of pairs alone: which pair each row is, -1 an empty one

    def arrays(self, references: np.ndarray | None = None, own: Own = range) -> dict[str, np.ndarray]:
        """What a training step is given. ``references`` [n + 1, 2]: of both answers of each pair, and of an empty row;
        each row, of which this process made its ``own``, gets its number."""
        found = {"ids": self.ids, "labels": self.labels, "segments": self.segments}
        if references is not None:
            assert self.index is not None
            both = references[self.index].T.reshape(-1)  # the chosen ones first
            found["reference"] = both[list(own(self.size))]
        return found

    @property
    def tokens(self) -> int:
        """How many tokens are targets."""
        return int(np.count_nonzero(self.labels != IGNORED))


class Batches:
    """Training batches by number: ``batches[n]`` for any n >= 0 is a function of the arguments and n alone, so that a
    resumed run needs no more than its step.

    ``accumulation`` batches in a row, of one width, make a step. Every epoch is a shuffle of its own. Where a step's
    rows do not divide those of an epoch, its last step is filled up from the next one. Without packing, the rows of 32
    steps in a row are sorted by length, which makes steps of rows of like length, and these steps are shuffled. Packed
    rows are all ``max_seq_length`` wide; which examples share one is the same in each epoch.

    Attributes:
        per_epoch: batches in which every example occurs once, rounded up.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Sequence[Pair],
        batch_size: int,
        max_seq_length: int,
        seed: int,
        *,
        pack: bool = False,
        accumulation: int = 1,
        row_width: Callable[[int], int] = multiple,
    ):
        """``row_width``: how wide rows are made that hold so many tokens; never above ``max_seq_length``. InputError
        where the examples do not fill a batch."""
        import grain

        if batch_size < 1:
            raise InputError(f"{batch_size} is no number of rows; give at least 1.", option="batch_size")
        if seed < 0:
            raise InputError(f"{seed} is negative; give 0 or more.", option="seed")
        self._examples, self._batch_size, self._accumulation = examples, batch_size, accumulation
        self._limit, self._seed, self._row_width = max_seq_length, seed, row_width
        self._rows, self._widths = _rows(examples, max_seq_length, pack)
        if len(self._rows) < batch_size:
            packed = f", packed into {len(self._rows)} rows," if pack else ""
            raise InputError(
                f"{len(examples)} example{'s'[: len(examples) != 1]}{packed} do not fill one batch of {batch_size}; "
                f"give --batch-size {len(self._rows)}{' or less' * (len(self._rows) > 1)}, or more examples."
            )
        self._order = grain.MapDataset.source(range(len(self._rows))).seed(seed).shuffle().repeat()
        self._bucket = functools.lru_cache(maxsize=2)(self._sorted)
        self.per_epoch = -(-len(self._rows) // batch_size)

    def __getitem__(self, n: int) -> Batch:
        return self.part(n, range)

    def part(self, n: int, own: Own) -> Batch:
        """Batch n, of which only the ``own`` rows are made. Its width is that of the whole."""
        if n < 0:
            raise IndexError(n)
        step, micro = divmod(n, self._accumulation)
        rows = self._global_rows(step)
        mine = rows[micro * self._batch_size : (micro + 1) * self._batch_size]
        return _assemble(self._examples, [self._rows[row] for row in mine], self._width(rows), own)

    @functools.cached_property
    def padding(self) -> float:
        """Share of the positions of the first epoch (of its first 512 steps at most) that hold no token."""
        steps = [self._global_rows(n) for n in range(min(self._start(1), MEASURED))]
        parts = [part for rows in steps for row in rows for i in self._rows[row] for part in self._examples[i].parts]
        places = len(self._examples[0].parts) * sum(len(rows) * self._width(rows) for rows in steps)
        return 1 - sum(part.length for part in parts) / places

    def _width(self, rows: list[int]) -> int:
        return min(self._row_width(max(self._widths[row] for row in rows)), self._limit)

    @property
    def _size(self) -> int:
        """Rows of a step."""
        return self._batch_size * self._accumulation

    def _start(self, epoch: int) -> int:
        """The first step of an epoch: none of its rows comes from the epoch before."""
        return -(-epoch * len(self._rows) // self._size)

    def _global_rows(self, n: int) -> list[int]:
        """The rows of step n."""
        epoch = n * self._size // len(self._rows)
        first, end = self._start(epoch), self._start(epoch + 1)
        bucket = first + (n - first) // BUCKET * BUCKET
        return self._bucket(bucket, min(bucket + BUCKET, end))[n - bucket]

    def _sorted(self, first: int, end: int) -> list[list[int]]:
        """The steps from ``first`` to before ``end``."""
        size = self._size
        rows = sorted((self._order[i] for i in range(first * size, end * size)), key=lambda row: self._widths[row])
        order = np.random.default_rng((self._seed, first)).permutation(end - first)
        return [rows[b * size : (b + 1) * size] for b in order]


def evaluation_batches(
    examples: Sequence[Example] | Sequence[Pair],
    batch_size: int,
    max_seq_length: int,
    pack: bool = False,
    own: Own = range,
    row_width: Callable[[int], int] = multiple,
) -> Iterator[Batch]:
    """Every example once. Rows of like length share a batch; the batches come in a fixed random order, so that the
    first few are a fair sample. All have ``batch_size`` rows (pairs: twice that); missing ones are empty. ``own`` as
    in `Batches.part`, ``row_width`` as in `Batches`."""
    rows, widths = _rows(examples, max_seq_length, pack)
    order = sorted(range(len(rows)), key=lambda row: -widths[row])
    chunks = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    for b in np.random.default_rng(0).permutation(len(chunks)):
        width = min(row_width(widths[chunks[b][0]]), max_seq_length)
        chosen = [rows[row] for row in chunks[b]]
        yield _assemble(examples, chosen + [[]] * (batch_size - len(chosen)), width, own)


def _rows(examples: Sequence[Example] | Sequence[Pair], width: int, pack: bool) -> tuple[list[Row], list[int]]:
    """Which examples share a row, and how wide each row is."""
    lengths = [item.length for item in examples]
    if max(lengths, default=0) > width:
        raise InputError(f"an example has {max(lengths)} tokens, more than the {width} of a row; cut it.")
    if not pack:
        return [[i] for i in range(len(lengths))], lengths
    if isinstance(examples[0], Pair):
        raise InputError("pairs cannot be packed; leave --pack away.")
    rows = best_fit(lengths, width)
    return rows, [width] * len(rows)


def best_fit(lengths: Sequence[int], width: int) -> list[Row]:
    """Rows of at most ``width`` that hold every length once, by index: longest first, each goes where it leaves the
    least room."""
    rows: list[Row] = []
    with_room: dict[int, list[Row]] = {}  # by what is left of their width; ``rooms`` are its keys, sorted
    rooms: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, lengths[i])
        if at < len(rooms):
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[rooms.pop(at)]
        else:
            room, row = width, []
            rows.append(row)
        row.append(i)
        left = room - lengths[i]
        if left not in with_room:
            with_room[left] = []
            bisect.insort(rooms, left)
        with_room[left].append(row)
    return rows


def _assemble(examples: Sequence[Example] | Sequence[Pair], rows: Sequence[Row], width: int, own: Own) -> Batch:
    """One batch row for each of ``rows``; of pairs two, all chosen ones first. Of all these only the ``own`` ones."""
    sides = len(examples[0].parts)
    made = own(sides * len(rows))
    shape = (len(made), width)
    ids, labels, segments = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32), np.zeros(shape, np.int32)
    for b, place in enumerate(made):
        side, row = divmod(place, len(rows))
        at = 0
        for number, i in enumerate(rows[row], 1):
            part = examples[i].parts[side]
            here = slice(at, at + len(part.ids))
            ids[b, here], segments[b, here] = part.ids, number
            labels[b, here] = np.where(part.trained, part.ids, IGNORED)
            labels[b, at] = IGNORED  # what stands in front of it is another example, or nothing
            at = here.stop
    index = np.array([row[0] if row else -1 for row in rows], np.int32) if sides == 2 else None
    length = sum(part.length for row in rows for i in row for part in examples[i].parts)
    return Batch(ids, labels, segments, sides * len(rows), length, index)
