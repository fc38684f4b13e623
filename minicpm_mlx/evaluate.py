"""Accuracy of a model on the built-in model's held-out questions.

python -m minicpm_mlx.evaluate
"""

if __name__ == "__main__":
    from minicpm_data.cli import evaluate
    from minicpm_mlx.backend import backend

    evaluate.run_evaluate(backend, "python -m minicpm_mlx.evaluate")
