"""A conversation: the function, and the terminal.

    python -m minicpm_mlx.chat --model openbmb/MiniCPM-2B-sft-bf16

``--model`` left out is the built-in model.
"""

from minicpm_mlx.generate import backend, generator

chat = generator.chat

if __name__ == "__main__":
    from minicpm_data import commands

    commands.run_chat(backend, "python -m minicpm_mlx.chat")
