"""Store the keys and values of a prompt in a file, for prompts that begin with it.

python -m minicpm_mlx.cache_prompt --model openbmb/MiniCPM-2B-sft-bf16 --prompt - --prompt-cache-file book.safetensors
"""

if __name__ == "__main__":
    from minicpm_data.cli import cache_prompt
    from minicpm_mlx.backend import backend

    cache_prompt.run_cache_prompt(backend, "python -m minicpm_mlx.cache_prompt")
