"""The ways to start a command, and the flags of mlx_lm that are not options of the commands here."""
