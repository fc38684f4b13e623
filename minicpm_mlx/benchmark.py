"""Measure the speed and memory of generation on this machine.

python -m minicpm_mlx.benchmark --model openbmb/MiniCPM-2B-sft-bf16 --prompt-tokens 512 --generation-tokens 128
"""

if __name__ == "__main__":
    from minicpm_data.cli import benchmark
    from minicpm_mlx.backend import backend

    benchmark.run_benchmark(backend, "python -m minicpm_mlx.benchmark", "mlx")
