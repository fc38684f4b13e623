"""Configs by name, as docs import them."""

from weights_io.checkpoint import config_of

__all__ = ["config_of"]
