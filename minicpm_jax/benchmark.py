"""Measure the speed and memory of generation on this machine.

python -m minicpm_jax.benchmark --model openbmb/MiniCPM-2B-sft-bf16 --prompt-tokens 512 --generation-tokens 128
"""

from dataclasses import dataclass

from minicpm_data.cli import benchmark
from minicpm_jax.backend import backend
from minicpm_jax.options import Serving


@dataclass(frozen=True)
class Options(Serving, benchmark.BenchmarkOptions):
    pass


if __name__ == "__main__":
    benchmark.run_benchmark(backend, "python -m minicpm_jax.benchmark", "jax", Options)
