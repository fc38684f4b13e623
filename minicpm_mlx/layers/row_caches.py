"""The caches of a batch whose rows are of different length: one `mlx_lm` cache for each row.

A batched cache of `mlx_lm` pads all rows to the longest, and copies all of them where one joins or leaves. Here each
row is as long as its text; attention runs row by row, everything else for the whole batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx


class RowCaches:
    """One layer's caches of the rows of a batch, each of a single row."""

    def __init__(self, rows: Sequence[Any]):
        self.rows = rows

    @property
    def offset(self) -> mx.array:
        """[B] position of each row's next token."""
        return mx.array([row.offset for row in self.rows])

    def make_mask(self, width: int, **_: Any) -> mx.array | str | None:
        """The mask of ``width`` new tokens in each row, for `mlx_lm`."""
        return None if width == 1 else "causal"


def by_row(attend: Callable[..., mx.array], cache: Any, *arrays: mx.array) -> mx.array:
    """``attend(cache, *arrays)``, row by row where the rows have caches of their own."""
    if not isinstance(cache, RowCaches):
        return attend(cache, *arrays)
    rows = [attend(row, *(x[i : i + 1] for x in arrays)) for i, row in enumerate(cache.rows)]
    return rows[0] if len(rows) == 1 else mx.concatenate(rows)
