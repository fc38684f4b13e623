"""Accuracy of a model on the built-in model's held-out questions.

python -m minicpm_jax.evaluate
"""

from dataclasses import dataclass

from minicpm_data.cli import evaluate
from minicpm_jax.backend import backend
from minicpm_jax.options import Serving


@dataclass(frozen=True)
class Options(Serving, evaluate.EvaluateOptions):
    pass


if __name__ == "__main__":
    evaluate.run_evaluate(backend, "python -m minicpm_jax.evaluate", Options)
