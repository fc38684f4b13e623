"""How many of the built-in model's held-out questions a model answers rightly.

python -m minicpm_jax.evaluate
"""

if __name__ == "__main__":
    from minicpm_data import evaluation
    from minicpm_jax.generate import backend

    evaluation.run_evaluate(backend, "python -m minicpm_jax.evaluate")
