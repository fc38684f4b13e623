"""The precision of a product on a TPU, which rounds float32 unless told otherwise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def precision(x: Array) -> jax.lax.Precision | None:
    """float32 means float32: TPUs would otherwise round float32 operands to bfloat16."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
