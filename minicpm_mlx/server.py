"""An HTTP server with OpenAI's API; the same command as `minicpm_serve.openai_api` with this backend.

python -m minicpm_mlx.server --model openbmb/MiniCPM-2B-sft-bf16 --port 8000
"""

if __name__ == "__main__":
    from weights_io.command_line import run_above

    run_above("server", "python -m minicpm_mlx.server", backend="mlx", mesh=None)
