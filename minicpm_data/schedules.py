"""Learning rate schedules as functions of the step. They run on the host, for both backends."""

import math
from dataclasses import dataclass
from typing import Literal

from weights_io.errors import InputError

Decay = Literal["exponential", "linear", "cosine", "1-sqrt"]


@dataclass(frozen=True)
class WarmupStableDecay:
    """The WSD schedule (arXiv 2404.06395, section 4): linear warm-up, constant, then a short decay.

    Arguments:
        peak: the constant learning rate.
        steps: the total number of optimizer steps.
        warmup_steps: steps of the warm-up.
        decay_steps: steps of the decay, at the end.
        decay: ``exponential`` halves the rate every ``half_life`` steps; the other forms end at 0.
        half_life: in steps. The released models used 5000 for a decay of 18500 steps, which ends at 0.077 of the peak.

    Raises:
        InputError: warm-up and decay do not fit into the steps, or the half-life is not positive.
    """

    peak: float
    steps: int
    warmup_steps: int
    decay_steps: int
    decay: Decay = "exponential"
    half_life: float = 5000.0

    def __post_init__(self) -> None:
        if min(self.warmup_steps, self.decay_steps) < 0 or self.warmup_steps + self.decay_steps > self.steps:
            raise InputError(
                f"warm-up of {self.warmup_steps} and decay of {self.decay_steps} steps do not fit into {self.steps}."
            )
        if not self.half_life > 0:
            raise InputError(f"the half-life of the decay is {self.half_life}; it must be above 0 steps.")

    @property
    def decay_start(self) -> int:
        return self.steps - self.decay_steps

    def __call__(self, step: int) -> float:
        """The learning rate of a step, from 0 to ``steps`` - 1."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if step < self.decay_start:
            return self.peak
        into = step - self.decay_start + 1
        done = into / self.decay_steps
        return (
            self.peak
            * {
                "exponential": 0.5 ** (into / self.half_life),
                "linear": 1 - done,
                "cosine": 0.5 * (1 + math.cos(math.pi * done)),
                "1-sqrt": 1 - math.sqrt(done),
            }[self.decay]
        )
