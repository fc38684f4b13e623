"""Training: losses, optimizers, steps, checkpoints."""
