"""How a command is started, shows its options and refuses wrong ones, and the flags of mlx_lm that are no options here.

`weights_io.command_line` runs the commands.
"""
