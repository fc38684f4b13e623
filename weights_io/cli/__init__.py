"""How a command line shows its options, and how it refuses wrong ones. `weights_io.command_line` runs the commands."""
