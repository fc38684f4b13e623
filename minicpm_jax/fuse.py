"""Merge an adapter into the weights of its model; the same command as `weights_io.fuse`, which needs no backend.

python -m minicpm_jax.fuse --model openbmb/MiniCPM-2B-sft-bf16 --adapter-path adapters --save-path fused_model
"""

from weights_io.fuse import Options, main

if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m minicpm_jax.fuse")
