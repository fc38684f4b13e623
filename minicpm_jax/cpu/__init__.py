"""What only XLA:CPU needs."""
