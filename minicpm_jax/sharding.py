"""Meshes and shardings, as docs and notebooks import them."""

from minicpm_jax.parallel.mesh import make_mesh
from minicpm_jax.parallel.sharding import shardings

__all__ = ["make_mesh", "shardings"]
