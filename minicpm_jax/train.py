"""The weights of a model by name, as docs and notebooks import them."""

from minicpm_jax.training.step import weights_of

__all__ = ["weights_of"]
