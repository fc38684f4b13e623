"""Chat: the function, and the terminal command.

    python -m minicpm_jax.chat --model openbmb/MiniCPM-2B-sft-bf16

Without ``--model`` the built-in model is used.
"""

from dataclasses import dataclass

from minicpm_data.cli.generate_options import ChatOptions
from minicpm_jax.backend import backend, generator
from minicpm_jax.options import Serving


@dataclass(frozen=True)
class Options(Serving, ChatOptions):
    pass


chat = generator.chat

if __name__ == "__main__":
    from minicpm_data.cli import generate

    generate.run_chat(backend, "python -m minicpm_jax.chat", Options)
