"""Chat: the function, and the terminal command.

    python -m minicpm_mlx.chat --model openbmb/MiniCPM-2B-sft-bf16

Without ``--model`` the built-in model is used.
"""

from minicpm_mlx.backend import backend, generator

chat = generator.chat

if __name__ == "__main__":
    from minicpm_data.cli import generate

    generate.run_chat(backend, "python -m minicpm_mlx.chat")
