"""Examples to batches: whole examples packed into rows or rows of like length, in an order that a number decides."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minicpm_data.examples import Example, Pair

IGNORED = -100  # a label that is not trained, as in PyTorch


@dataclass(frozen=True)
class Batch:
    """Rows of one width. B is the batch size; of pairs 2 B: the chosen ones, then the rejected ones in the same order.
    A row of nothing but padding is an empty row."""

    ids: np.ndarray  # [B, T] int32
    labels: np.ndarray  # [B, T] int32: the token itself where it is a target, else -100; position t - 1 predicts t
    segments: np.ndarray  # [B, T] int32: 1, 2, ... number the examples of a row, 0 is padding
    index: np.ndarray | None = None  # [B] int32, of pairs alone: which pair each row is, -1 an empty one

    @property
    def tokens(self) -> int:
        """How many tokens are targets."""
        return int(np.count_nonzero(self.labels != IGNORED))


class Batches:
    """Training batches by number: ``batches[n]`` for any n >= 0 is a function of the arguments and n alone, so that a
    resumed run needs no more than its step.

    Attributes:
        per_epoch: batches in which every example occurs once (rounded up).
        padding: share of an epoch's positions that hold no token.
    """

    per_epoch: int
    padding: float

    def __init__(
        self,
        examples: Sequence[Example] | Sequence[Pair],
        batch_size: int,
        max_seq_length: int,
        seed: int,
        *,
        pack: bool = False,
        shard: tuple[int, int] = (0, 1),
    ):
        """``shard`` (p, P): the rows of process p of P, which must divide ``batch_size``; all have the same width.
        InputError where the examples do not fill a batch."""
        raise NotImplementedError

    def __getitem__(self, n: int) -> Batch:
        raise NotImplementedError


def evaluation_batches(
    examples: Sequence[Example] | Sequence[Pair], batch_size: int, max_seq_length: int, pack: bool = False
) -> Iterator[Batch]:
    """Every example once. Rows of like length share a batch; the batches come in a fixed random order, so that the
    first few are a fair sample. All have ``batch_size`` rows (pairs: twice that); missing ones are empty."""
    raise NotImplementedError
