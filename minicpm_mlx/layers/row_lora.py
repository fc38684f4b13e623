"""LoRA layers with another adapter for each row of a batch.

Dims: B rows, A adapters, R the largest rank, O out, I in.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import mlx.core as mx
import mlx.nn as nn

_ROWS: ContextVar[mx.array | None] = ContextVar("rows", default=None)


@contextlib.contextmanager
def adapter_rows(rows: mx.array | None) -> Iterator[None]:
    """The adapter [B] of each row, for graphs that are built meanwhile; 0 or None: no adapter."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


class RowLoRALayer(nn.Module):
    """Adapts y = W x to y + B A x with the A [A, R, I] and B [A, O, R] of each row's adapter. The scale is in B."""

    def __init__(self, base: nn.Module, a: mx.array, b: mx.array):
        super().__init__()
        self.base, self.a, self.b = base, a, b

    def __call__(self, x: mx.array) -> mx.array:
        y, rows = self.base(x), _ROWS.get()
        if rows is None:
            return y
        low = x.astype(self.a.dtype) @ self.a[rows].swapaxes(-1, -2)
        return y + (low @ self.b[rows].swapaxes(-1, -2)).astype(y.dtype)
