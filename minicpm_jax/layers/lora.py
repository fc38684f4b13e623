"""The layer of a LoRA or DoRA adapter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from minicpm_jax.layers.kernels.precision import precision
from minicpm_jax.layers.ops import linear
from minicpm_jax.parallel.sharding import pad_or_trim

LoRAParams = dict[str, Array]  # a [.., R, I], b [.., O, R], and for DoRA magnitude [.., O]
MatMul = Callable[[Any, Array], Array]  # (weight, x) -> y


class LoRALayer(nnx.Module):
    """Adapts y = W x to y + scale B A x. DoRA also multiplies each output by magnitude / norm of the row of W + scale B
    A."""

    def __init__(self, params: LoRAParams, scale: float, dropout: float, width: int):
        """``params``: "a", "b" and optionally "ratio" (DoRA) and "key" (dropout). ``width``: I without a mesh's
        padding."""
        self.a, self.b = nnx.Param(params["a"]), nnx.Param(params["b"])
        self.ratio = nnx.data(params.get("ratio"))
        self.key = nnx.data(params.get("key"))  # dropout keys, one per layer; None: no dropout
        self.scale, self.dropout, self.width = scale, dropout, width

    def __call__(
        self, x: Array, y: Array, matmul: MatMul = linear, ratio: Callable[[Array], Array] = lambda ratio: ratio
    ) -> Array:
        """``matmul``: the product of a weight and x. ``ratio``: selects the DoRA ratios that belong to y (of each
        expert)."""
        with jax.named_scope("adapter"):
            a, b = self.a[...], self.b[...]
            x = x.astype(a.dtype)
            if self.key is not None:
                keep = jax.random.bernoulli(self.key, 1 - self.dropout, (*x.shape[:-1], self.width))
                x = jnp.where(pad_or_trim(keep, x.shape), x / (1 - self.dropout), 0)
            added = self.scale * matmul(b, matmul(a, x))
            if self.ratio is None:
                return y + added.astype(y.dtype)
            return ((y + added) * ratio(self.ratio)).astype(y.dtype)


def effective_weight(layer: Any, dtype: Any) -> Float[Array, "O I"]:
    """The weight with which a `linear.Linear` multiplies, adapted and dequantized, in ``dtype``. An adapter's dropout
    is not in it."""
    weight, adapter = layer.weight[...], layer.adapter
    if adapter is None:
        return weight.astype(dtype)
    a, b = adapter.a[...], adapter.b[...]
    wide = weight.astype(a.dtype) + adapter.scale * jnp.matmul(b, a, precision=precision(a))
    return (wide if adapter.ratio is None else wide * adapter.ratio[:, None]).astype(dtype)


def ratio(weight: Any, params: LoRAParams, scale: float) -> Float[Array, "... O"]:
    """DoRA's magnitudes over the norms of the rows of W + scale B A. The norms are treated as constants (section 4.3 of
    the paper), and W + scale B A is never built."""
    a, b = params["a"], params["b"]
    fixed = jax.lax.stop_gradient((a, b))

    def squares(layer):
        weight, a, b = layer
        wide = weight[...][..., : b.shape[-2], : a.shape[-1]].astype(jnp.float32)  # a mesh may have padded it
        inner = 2 * jnp.einsum("...oi,...ri->...or", wide, a, precision=precision(a))
        outer = jnp.einsum("...os,...si,...ri->...or", b, a, a, precision=precision(a))
        return jnp.sum(wide * wide, axis=-1) + scale * jnp.sum(b * (inner + scale * outer), axis=-1)

    norms = jnp.sqrt(jax.lax.map(squares, (weight, *fixed)))
    # A layer without an adapter has A = 0: neither its matrices nor its magnitude learn.
    adapted = jnp.any(fixed[0] != 0, axis=(-1, -2))[..., None]
    magnitude = jnp.where(adapted, params["magnitude"], norms)
    return magnitude / norms


def _row_squares(weight: Any) -> Float[Array, "... O"]:
    """Squared norms of the rows, with one layer at a time in float32."""
    return jax.lax.map(lambda layer: jnp.sum(layer[...].astype(jnp.float32) ** 2, axis=-1), weight)
