"""How likely a token was: its log probability, and those of the likeliest tokens in its place.

The probabilities are the model's own, before bias, penalties, temperature and grammar, as vLLM reports them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenScore:
    """The log probability of a token, and ids and log probabilities of the likeliest ones, the likeliest first."""

    logprob: float
    likeliest: tuple[tuple[int, float], ...]

    @staticmethod
    def of(logprob: Any, ids: Sequence[Any], logprobs: Sequence[Any], count: int) -> "TokenScore":
        """From a token's numbers on the host. ``count``: likeliest tokens that are wanted."""
        pairs = zip(ids[:count], logprobs[:count], strict=True)
        return TokenScore(float(logprob), tuple((int(i), float(value)) for i, value in pairs))
