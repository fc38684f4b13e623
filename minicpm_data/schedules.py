"""Learning rates as plain functions of the step, computed on the host and handed to either backend's training step."""

import math
from dataclasses import dataclass
from typing import Literal

from weights_io.errors import InputError

Decay = Literal["exponential", "linear", "cosine", "1-sqrt"]


@dataclass(frozen=True)
class WarmupStableDecay:
    """The WSD schedule (arXiv 2404.06395, section 4): linear warm-up, constant, then a short decay.

    ``steps``, ``warmup_steps``, ``decay_steps``, ``half_life`` in optimizer steps; ``peak`` is the constant rate. The
    decay takes the last ``decay_steps``; ``exponential`` halves every ``half_life`` steps (the released models: 5000,
    over 18500 steps, so down to 0.077 of the peak), the other forms end at zero.
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
        """The rate of step 0, 1, ... ``steps`` - 1."""
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
