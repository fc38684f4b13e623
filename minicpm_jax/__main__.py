"""Lists the commands."""

from weights_io.command_line import print_commands

if __name__ == "__main__":
    print_commands("minicpm_jax")
