"""Generation in MLX."""
