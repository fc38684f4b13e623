"""The precision of a matrix product: a TPU rounds float32 operands to bfloat16 unless told otherwise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def precision(x: Array) -> jax.lax.Precision | None:
    """HIGHEST for float32, so that float32 products are computed in float32 on a TPU; None (the default) for other
    dtypes."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
