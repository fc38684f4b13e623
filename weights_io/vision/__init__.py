"""What a checkpoint that sees has beside its decoder: the config, the parameter table and the tensor names."""
