"""Store the keys and values of a prompt in a file, for prompts that begin with it.

python -m minicpm_jax.cache_prompt --model openbmb/MiniCPM-2B-sft-bf16 --prompt - --prompt-cache-file book.safetensors
"""

from dataclasses import dataclass

from minicpm_data.cli import cache_prompt
from minicpm_jax.backend import backend
from minicpm_jax.options import Serving


@dataclass(frozen=True, kw_only=True)
class Options(Serving, cache_prompt.CachePromptOptions):
    pass


if __name__ == "__main__":
    cache_prompt.run_cache_prompt(backend, "python -m minicpm_jax.cache_prompt", Options)
