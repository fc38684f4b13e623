"""What the two backends' generators share: the sampling options, the prompt's ids, the ids that end an answer."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Applied in this order, as transformers does: ``repetition_penalty`` on every token
    of prompt and answer so far (1: none), ``temperature`` (0: the likeliest token), ``top_k`` (0: all), ``top_p``
    (1: all), ``min_p`` (share of the likeliest token's probability; 0: all). ``seed`` None: another draw each time."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._require("temperature", 0 <= self.temperature < math.inf, "at least 0 (0 is greedy)")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "a whole number, 0 for no limit")
        self._require("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._require("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 is none)")
        self._require("seed", self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise InputError(f"{name} is {getattr(self, name)}; it must be {what}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1


def prompt_ids(tokenizer: "Tokenizer | None", prompt: str | Sequence[int], vocab_size: int) -> list[int]:
    """The ids of a prompt: a text gets BOS once and no template; ids are taken as they are."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("a text prompt needs a tokenizer, and this checkpoint has none; give a list of token ids.")
        ids = tokenizer.encode(prompt)
    else:
        ids = [int(i) for i in prompt]
    if not ids:
        raise InputError("the prompt is empty; give at least one token.")
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong:
        raise InputError(f"token id {wrong[0]} of the prompt is outside the vocabulary of {vocab_size}.")
    return ids


def check_max_tokens(max_tokens: int) -> int:
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; it must be at least 1.")
    return max_tokens


def end_ids(model: Any, tokenizer: "Tokenizer | None", extra: Iterable[int] = ()) -> frozenset[int]:
    """The ids that end an answer: the union of config.json, generation_config.json and the tokenizer."""
    return frozenset([*model.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ()), *extra])
