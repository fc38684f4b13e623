"""Perplexity of a model on texts; the same command as `minicpm_serve.perplexity` with this backend.

python -m minicpm_jax.perplexity --model openbmb/MiniCPM-2B-sft-bf16 --data-path texts.jsonl
"""

if __name__ == "__main__":
    from weights_io.command_line import run_above

    run_above("perplexity", "python -m minicpm_jax.perplexity", backend="jax")
