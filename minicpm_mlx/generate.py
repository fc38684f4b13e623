"""Generate text from a prompt.

    python -m minicpm_mlx.generate --model openbmb/MiniCPM-2B-sft-bf16 --prompt "What is the capital of China?"

Without ``--model`` the built-in model is used. The prompt is formatted with the checkpoint's chat template.
"""

from minicpm_mlx.backend import backend, generator

stream_generate = generator.stream_generate
generate = generator.generate
batch_generate = generator.batch_generate

if __name__ == "__main__":
    from minicpm_data.cli import generate as commands

    commands.run_generate(backend, "python -m minicpm_mlx.generate")
