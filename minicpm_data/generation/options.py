"""Options of generation: sampling, the cache, lengths."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weights_io.errors import InputError

if TYPE_CHECKING:
    import numpy as np

MOST = 2**31 - 1  # tokens, of anything


ANSWER_TOKENS = 256  # at most, where nobody says how many
CHAT_TOKENS, CHAT_TEMPERATURE, CHAT_TOP_P = 1024, 0.3, 0.8  # the original's temperature and top_p


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
        self._require("temperature", 0 <= self.temperature < math.inf, "a number from 0 on (0 is greedy)")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require(
            "top_k", 0 <= self.top_k < math.inf and self.top_k == int(self.top_k), "a whole number, 0 for no limit"
        )
        self._require("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._require("repetition_penalty", 1e-6 <= self.repetition_penalty <= 1e6, "from 1e-6 to 1e6 (1 is none)")
        self._require("seed", self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0 to 2**63 - 1")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise InputError(f"is {getattr(self, name)}; it must be {what}.", option=name)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1

    def row_keys(self, rows: int) -> "np.ndarray":
        """A key [2] of uint32 for each row of a batch, by seed and row; both backends' generators take such keys."""
        import numpy as np

        seed = secrets.randbits(63) if self.seed is None else self.seed
        return np.stack([np.random.SeedSequence((seed, row)).generate_state(2) for row in range(rows)])


@dataclass(frozen=True)
class CacheOptions:
    """What is kept of the tokens so far. ``kv_bits``: keys and values in so many bits (JAX: 8; MLX: 4 or 8, in groups
    of ``kv_group_size`` numbers, None: 64, or 32 where 64 does not divide a head); None: in the model's dtype (in
    float32 where JAX decodes on a CPU). ``max_kv_size`` (MLX): only the first 4 and the latest so many; None: all.
    ``prefill_step_size``: tokens of a prompt that are run together, a matter of memory alone."""

    kv_bits: int | None = None
    max_kv_size: int | None = None
    prefill_step_size: int = 512
    kv_group_size: int | None = None

    def __post_init__(self) -> None:
        if self.kv_bits not in (None, 4, 8):
            raise InputError(f"is {self.kv_bits}; it must be 4 or 8.", option="kv_bits")
        for name, least in (("max_kv_size", 8), ("prefill_step_size", 1), ("kv_group_size", 1)):
            value = getattr(self, name)
            if value is not None and not (least <= value <= MOST and value == int(value)):
                raise InputError(f"is {value}; it must be a whole number, from {least} to {MOST}.", option=name)
        if self.kv_bits and self.max_kv_size:
            raise InputError("and {max_kv_size} do not go together; leave one of them out.", "kv_bits", ["max_kv_size"])


GREEDY, PLAIN_CACHE = Sampling(), CacheOptions()  # where nobody says otherwise


def seen_tokens(prompts: Sequence[Sequence[int]], vocab_size: int) -> "np.ndarray":
    """[B, V] bool: the tokens of each prompt, for the repetition penalty."""
    import numpy as np

    seen = np.zeros((len(prompts), vocab_size), bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(prompt)] = True
    return seen
