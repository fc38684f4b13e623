"""Lists the commands, and runs one: ``python -m minicpm_data COMMAND ...``."""

from weights_io.cli.launcher import launch

if __name__ == "__main__":
    launch(__package__, f"python -m {__package__}")
