"""A conversation: the function, and the terminal.

    python -m minicpm_jax.chat --model openbmb/MiniCPM-2B-sft-bf16

``--model`` left out is the built-in model.
"""

from dataclasses import dataclass

from minicpm_data.commands import ChatOptions
from minicpm_jax.generate import backend, generator
from minicpm_jax.placement import Serving


@dataclass(frozen=True)
class Options(Serving, ChatOptions):
    pass


chat = generator.chat

if __name__ == "__main__":
    from minicpm_data import commands

    commands.run_chat(backend, "python -m minicpm_jax.chat", Options)
