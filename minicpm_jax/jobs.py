"""Configs by name, as docs import them."""

from minicpm_jax.aot.programs import config_of

__all__ = ["config_of"]
