"""How many of the built-in model's held-out questions a model answers rightly.

python -m minicpm_jax.evaluate
"""

from dataclasses import dataclass

from minicpm_data import evaluation
from minicpm_jax.generate import backend
from minicpm_jax.placement import Serving


@dataclass(frozen=True)
class Options(Serving, evaluation.EvaluateOptions):
    pass


if __name__ == "__main__":
    evaluation.run_evaluate(backend, "python -m minicpm_jax.evaluate", Options)
