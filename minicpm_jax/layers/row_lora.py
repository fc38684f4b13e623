"""LoRA layers with another adapter for each row of a batch.

Dims: B rows, A adapters, R the largest rank, O out, I in.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from minicpm_jax.layers.kernels.precision import precision

_ROWS: ContextVar[Array | None] = ContextVar("rows", default=None)


@contextlib.contextmanager
def adapter_rows(rows: Int[Array, "B"] | None) -> Iterator[None]:
    """The adapter of each row, for what is traced meanwhile; 0 or None: no adapter."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


class RowLoRALayer(nnx.Module):
    """Adapts y = W x to y + B A x with the A and B of each row's adapter. The scale is in B."""

    def __init__(self, a: Float[Array, "... A R I"], b: Float[Array, "... A O R"]):
        self.a, self.b = nnx.Param(a), nnx.Param(b)

    def __call__(self, x: Float[Array, "B T I"], y: Float[Array, "B T O"]) -> Float[Array, "B T O"]:
        rows = _ROWS.get()
        if rows is None:
            return y
        with jax.named_scope("adapter"):
            a, b = jnp.take(self.a[...], rows, axis=0), jnp.take(self.b[...], rows, axis=0)
            exact = precision(a)
            low = jnp.einsum("bti,bri->btr", x.astype(a.dtype), a, precision=exact)
            return y + jnp.einsum("btr,bor->bto", low, b, precision=exact).astype(y.dtype)
