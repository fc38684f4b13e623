"""Generate text from a prompt.

    python -m minicpm_jax.generate --model openbmb/MiniCPM-2B-sft-bf16 --prompt "What is the capital of China?"

Without ``--model`` the built-in model is used. The prompt is formatted with the checkpoint's chat template.
"""

from dataclasses import dataclass

from minicpm_data.cli.generate_options import GenerateOptions
from minicpm_jax.backend import backend, generator
from minicpm_jax.options import Placement, Serving


@dataclass(frozen=True)
class Options(Serving, Placement, GenerateOptions):
    pass


stream_generate = generator.stream_generate
generate = generator.generate
batch_generate = generator.batch_generate

if __name__ == "__main__":
    from minicpm_data.cli import generate as commands

    commands.run_generate(backend, "python -m minicpm_jax.generate", Options)
