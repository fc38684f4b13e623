"""Code that only XLA:CPU needs."""
