"""Convert a model to another format; the same command as `weights_io.convert`, which needs no backend.

python -m minicpm_jax.convert --hf-path openbmb/MiniCPM-2B-sft-bf16 --to hf --save-path converted
"""

from weights_io.convert import Options, main

if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m minicpm_jax.convert")
