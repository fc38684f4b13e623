"""Examples to batches: packed rows, or rows of similar length, in an order that the seed determines."""

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minicpm_data.datasets.examples import IGNORED, Example, LocalRows, Pair
from minicpm_data.datasets.images import StoredImage, image_arrays
from weights_io.errors import InputError

MULTIPLE = 32  # widths are multiples of it
BUCKET = 32  # steps whose rows are sorted by length together
MEASURED = 512  # steps over which the padding is measured

Row = list[int]  # the indices of the examples in a row; [] is a padding row


def multiple(width: int) -> int:
    """``width`` rounded up to a multiple of 32."""
    return -(-width // MULTIPLE) * MULTIPLE


def one_of_few(width: int) -> int:
    """``width`` rounded up to one of 32, 48, 64, 96, 128, ...: for a backend that compiles a program per width."""
    power = max(MULTIPLE, 1 << (width - 1).bit_length())
    return power * 3 // 4 if power > MULTIPLE and width <= power * 3 // 4 else power


@dataclass(frozen=True)
class Batch:
    """Rows of one width.

    B is the batch size, doubled for pairs: first the chosen answers, then the rejected ones in the same order. With
    several processes, the arrays hold only the rows of this process.
    """

    ids: np.ndarray  # [B, T] int32; `IMAGE` at the tokens of images
    labels: np.ndarray  # [B, T] int32: the token id where it is a target, else -100; position t - 1 predicts t
    segments: np.ndarray  # [B, T] int32: 1, 2, ... for the examples of a row, 0 for padding
    size: int  # B over all processes
    length: int  # tokens over all processes, targets or not
    trained: int  # targets over all processes
    index: np.ndarray | None = None  # [B] int32, for pairs only: the index of each row's pair, -1 for padding rows
    images: tuple[StoredImage, ...] = ()  # in the order of their tokens, row by row

    def arrays(self, references: np.ndarray | None = None, local_rows: LocalRows = range) -> dict[str, np.ndarray]:
        """The arrays of a training step, by name; with images those of `image_arrays` too.

        Arguments:
            references: [n + 1, 2], the reference log-probabilities of every pair's answers, and of a padding row.
            local_rows: the rows of this process, which are looked up in ``references``.
        """
        found = {"ids": self.ids, "labels": self.labels, "segments": self.segments}
        if references is not None:
            assert self.index is not None
            both = references[self.index].T.reshape(-1)  # chosen answers first
            found["reference"] = both[list(local_rows(self.size))]
        return {**found, **image_arrays(self.ids, self.images)} if self.images else found

    @property
    def tokens(self) -> int:
        """Number of targets."""
        return int(np.count_nonzero(self.labels != IGNORED))


class Batches:
    """Training batches by number. ``batches[n]`` depends only on the arguments and n, so a run can resume at any step.

    ``accumulation`` consecutive batches of one width form a step. Each epoch is shuffled anew. An epoch's last step is
    completed with rows of the next epoch. Without packing, the rows of 32 consecutive steps are sorted by length and
    cut into steps of similar length, and these steps are shuffled. Packed rows are ``max_seq_length`` wide, and hold
    the same examples in every epoch.

    Attributes:
        per_epoch: batches per epoch, rounded up.
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
        """
        Arguments:
            examples: as `load_split` returns them.
            batch_size: examples, pairs or packed rows per batch.
            max_seq_length: the widest row, in tokens.
            seed: of the order.
            pack: put several short examples into one row.
            accumulation: batches per step.
            row_width: rounds a width in tokens up; the result is cut to ``max_seq_length``.

        Raises:
            InputError: the examples do not fill one batch, or an argument is out of range.
        """
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

    def part(self, n: int, local_rows: LocalRows) -> Batch:
        """Batch n with only the ``local_rows``. The width is that of the whole batch."""
        if n < 0:
            raise IndexError(n)
        step, micro = divmod(n, self._accumulation)
        rows = self._global_rows(step)
        mine = rows[micro * self._batch_size : (micro + 1) * self._batch_size]
        return _assemble(self._examples, [self._rows[row] for row in mine], self._width(rows), local_rows)

    @functools.cached_property
    def padding(self) -> float:
        """The share of padding in the first epoch, over at most 512 steps."""
        steps = [self._global_rows(n) for n in range(min(self._start(1), MEASURED))]
        parts = [part for rows in steps for row in rows for i in self._rows[row] for part in self._examples[i].parts]
        places = len(self._examples[0].parts) * sum(len(rows) * self._width(rows) for rows in steps)
        return 1 - sum(part.length for part in parts) / places

    def _width(self, rows: list[int]) -> int:
        return min(self._row_width(max(self._widths[row] for row in rows)), self._limit)

    @property
    def _size(self) -> int:
        """Rows per step."""
        return self._batch_size * self._accumulation

    def _start(self, epoch: int) -> int:
        """The first step of an epoch, with no row of the epoch before."""
        return -(-epoch * len(self._rows) // self._size)

    def _global_rows(self, n: int) -> list[int]:
        """The rows of step n, of all processes."""
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
    local_rows: LocalRows = range,
    row_width: Callable[[int], int] = multiple,
) -> Iterator[Batch]:
    """Every example once, for a validation or test loss.

    Rows of similar length share a batch. The batches come in a fixed random order, so that the first few are a fair
    sample. Every batch has ``batch_size`` rows (twice that for pairs); the last one is padded with empty rows.

    Arguments:
        examples: as `load_split` returns them.
        batch_size: rows of examples, or pairs, per batch.
        max_seq_length: the widest row, in tokens.
        pack: put several short examples into one row.
        local_rows: the rows that this process makes; see `Batches.part`.
        row_width: rounds a width in tokens up; see `Batches`.
    """
    rows, widths = _rows(examples, max_seq_length, pack)
    order = sorted(range(len(rows)), key=lambda row: -widths[row])
    chunks = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    for b in np.random.default_rng(0).permutation(len(chunks)):
        width = min(row_width(widths[chunks[b][0]]), max_seq_length)
        chosen = [rows[row] for row in chunks[b]]
        yield _assemble(examples, chosen + [[]] * (batch_size - len(chosen)), width, local_rows)


def _rows(examples: Sequence[Example] | Sequence[Pair], width: int, pack: bool) -> tuple[list[Row], list[int]]:
    """The examples of each row, and the width of each row in tokens."""
    lengths = [item.length for item in examples]
    if max(lengths, default=0) > width:
        raise InputError(f"an example has {max(lengths)} tokens, more than the {width} of a row; cut it.")
    if not pack:
        return [[i] for i in range(len(lengths))], lengths
    if isinstance(examples[0], Pair):
        raise InputError("pairs cannot be packed; leave out --pack.")
    rows = best_fit(lengths, width)
    return rows, [width] * len(rows)


def best_fit(lengths: Sequence[int], width: int) -> list[Row]:
    """Pack lengths into rows of at most ``width`` (best-fit decreasing). Returns the indices of each row."""
    rows: list[Row] = []
    with_room: dict[int, list[Row]] = {}  # free tokens -> rows; ``rooms`` are the sorted keys
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


def _assemble(
    examples: Sequence[Example] | Sequence[Pair], rows: Sequence[Row], width: int, local_rows: LocalRows
) -> Batch:
    """One batch row for each of ``rows``, two for a pair (chosen answers first). Only ``local_rows`` are made."""
    sides = len(examples[0].parts)
    made = local_rows(sides * len(rows))
    shape = (len(made), width)
    ids, labels, segments = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32), np.zeros(shape, np.int32)
    images: list[StoredImage] = []
    for b, place in enumerate(made):
        side, row = divmod(place, len(rows))
        at = 0
        for number, i in enumerate(rows[row], 1):
            part = examples[i].parts[side]
            here = slice(at, at + len(part.ids))
            ids[b, here], segments[b, here] = part.ids, number
            labels[b, here] = np.where(part.trained, part.ids, IGNORED)
            labels[b, at] = IGNORED  # the first token has no predecessor in its example
            at = here.stop
            images += part.images
    index = np.array([row[0] if row else -1 for row in rows], np.int32) if sides == 2 else None
    parts = [part for row in rows for i in row for part in examples[i].parts]
    length, trained = sum(part.length for part in parts), sum(int(part.trained[1:].sum()) for part in parts)
    return Batch(ids, labels, segments, sides * len(rows), length, trained, index, tuple(images))
