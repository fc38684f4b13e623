"""Checkpoints in and out: configs, the parameter table, lazy readers, writers. Needs numpy only, never jax or mlx."""
