"""Options of generation: sampling, the key/value cache and lengths."""

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from minicpm_data.arguments import check_keywords, check_number, check_whole_numbers
from weights_io.errors import InputError, short

if TYPE_CHECKING:
    import numpy as np

MOST = 2**31 - 1  # upper bound of every number of tokens
MOST_SPECIAL = 64  # ids that XTC keeps: an array of this length is an input of JAX's programs
MOST_LOGPROBS = 20  # likeliest tokens whose probabilities a request may ask for
MOST_BIASED = 300  # ids of logit_bias: likewise

ANSWER_TOKENS = 256  # default of max_tokens
CHAT_TOKENS = 1024  # of a chat
IN_ANSWER = 2  # in `count_tokens`, for each time that the answer has a token


def _pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    """A ``logit_bias`` as sorted pairs. Raises `InputError`."""
    try:
        pairs = [(i, float(value)) for i, value in (bias.items() if isinstance(bias, Mapping) else bias)]
    except (TypeError, ValueError):
        raise InputError(f"is {short(repr(bias))}; it must hold token ids with a number each.", "logit_bias") from None
    if len(pairs) > MOST_BIASED:
        raise InputError(f"holds {len(pairs):,} tokens; give at most {MOST_BIASED}.", option="logit_bias")
    for i, value in pairs:
        if not isinstance(i, int) or isinstance(i, bool):
            raise InputError(f"holds {short(repr(i))}, which is no token id; give whole numbers.", option="logit_bias")
        if not -100 <= value <= 100:
            raise InputError(f"gives token {i} {value:g}; it must be from -100 to 100.", option="logit_bias")
    return tuple(sorted(dict(pairs).items()))


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled. The logits are changed in the order of vLLM and mlx_lm, then filtered in that of
    transformers, then XTC.

    Arguments, in that order:
        logit_bias: token id -> number, -100 to 100, that is added to its logit. It is kept as sorted pairs.
        repetition_penalty: on every token of the prompt and of the answer so far; 1 is none.
        frequency_penalty: taken off a token's logit for each time that the answer so far has the token; 0 is none.
        presence_penalty: taken off once for each token that the answer so far has; 0 is none.
        temperature: 0 is greedy.
        top_k: 0 keeps all tokens.
        top_p: 1 keeps all tokens.
        min_p: least probability relative to the most likely token's; 0 keeps all tokens.
        min_tokens_to_keep: most likely tokens that min_p keeps in any case.
        xtc_probability: how often XTC ("exclude top choices") is applied to a token; 0 is never.
        xtc_threshold: of the tokens above this probability XTC keeps only the least likely one. The probabilities are
            those at temperature 1 of the tokens that are left, as in mlx_lm.
        xtc_special_tokens: ids that XTC keeps. None: the ends of an answer and the line break, as in mlx_lm.
        seed: None draws a new seed for each request.

    Raises:
        InputError: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: tuple[int, ...] | None = None
    min_tokens_to_keep: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "xtc_probability", "xtc_threshold"):
            check_number(name, getattr(self, name))
        for name in ("presence_penalty", "frequency_penalty"):
            check_number(name, getattr(self, name))
            self._require(name, -2 <= getattr(self, name) <= 2, "from -2 to 2 (0 is none)")
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        for name in ("top_k", "min_tokens_to_keep"):
            check_number(name, getattr(self, name), whole=True)
        if self.seed is not None:
            check_number("seed", self.seed, whole=True)
        self._require("temperature", 0 <= self.temperature < math.inf, "a number from 0 on (0 is greedy)")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require(
            "top_k", 0 <= self.top_k < math.inf and self.top_k == int(self.top_k), "a whole number, 0 for no limit"
        )
        self._require("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._require("repetition_penalty", 1e-6 <= self.repetition_penalty <= 1e6, "from 1e-6 to 1e6 (1 is none)")
        self._require("seed", self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0 to 2**63 - 1")
        self._require("xtc_probability", 0 <= self.xtc_probability <= 1, "between 0 and 1 (0 is never)")
        self._require("xtc_threshold", 0 <= self.xtc_threshold <= 0.5, "between 0 and 0.5")
        kept = self.min_tokens_to_keep
        self._require("min_tokens_to_keep", 1 <= kept <= MOST and kept == int(kept), "a whole number, at least 1")
        if (special := self.xtc_special_tokens) is not None:
            check_whole_numbers("xtc_special_tokens", special)
            if len(special) > MOST_SPECIAL:
                raise InputError(f"holds {len(special)} ids; give at most {MOST_SPECIAL}.", option="xtc_special_tokens")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise InputError(f"is {short(getattr(self, name))}; it must be {what}.", option=name)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalized(self) -> bool:
        """Whether logits are changed before anything is filtered."""
        none = self.presence_penalty == self.frequency_penalty == 0 and not self.logit_bias
        return self.repetition_penalty != 1 or not none

    @property
    def bias(self) -> tuple[tuple[int, float], ...]:
        """``logit_bias`` as pairs of id and number."""
        return tuple(self.logit_bias)  # type: ignore[arg-type]  # it was made so

    @property
    def excludes(self) -> bool:
        """Whether XTC may be applied."""
        return self.xtc_probability > 0

    def row_keys(self, rows: int) -> "np.ndarray":
        """Random keys [rows, 2] uint32, one per batch row, for the generators of both backends."""
        import numpy as np

        seed = secrets.randbits(63) if self.seed is None else self.seed
        return np.stack([np.random.SeedSequence((seed, row)).generate_state(2) for row in range(rows)])


@dataclass(frozen=True)
class CacheOptions:
    """The key/value cache.

    Arguments:
        kv_bits: quantize keys and values to this many bits (JAX: 8; MLX: 4 or 8). None keeps the model's dtype
            (float32 where JAX decodes on a CPU).
        max_kv_size: MLX only: keep the first 4 tokens and rotate the rest within this size. None keeps all tokens.
        prefill_step_size: tokens per prefill chunk; it only affects memory.
        kv_group_size: quantization group size. None is 64 in MLX, or 32 where 64 does not divide a head; in JAX a
            group is a head.
        quantized_kv_start: MLX only: quantize the cache once it holds this many tokens; 0 is from the first one.

    Raises:
        InputError: a value is out of range, kv_bits and max_kv_size are both given, or an option of a quantized cache
            without kv_bits.
    """

    kv_bits: int | None = None
    max_kv_size: int | None = None
    prefill_step_size: int = 512
    kv_group_size: int | None = None
    quantized_kv_start: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None:
                check_number(name, value, whole=True)
        if self.kv_bits not in (None, 4, 8):
            raise InputError(f"is {self.kv_bits}; it must be 4 or 8.", option="kv_bits")
        for name, least in (
            ("max_kv_size", 8),
            ("prefill_step_size", 1),
            ("kv_group_size", 1),
            ("quantized_kv_start", 0),
        ):
            value = getattr(self, name)
            if value is not None and not (least <= value <= MOST and value == int(value)):
                raise InputError(f"is {value}; it must be a whole number, from {least} to {MOST}.", option=name)
        if self.kv_bits and self.max_kv_size:
            raise InputError("and {max_kv_size} do not go together; leave one of them out.", "kv_bits", ["max_kv_size"])
        for name in ("kv_group_size", "quantized_kv_start"):
            if self.kv_bits is None and getattr(self, name):
                raise InputError("is for {kv_bits}; give it too, or leave both out.", name, ["kv_bits"])


GREEDY, PLAIN_CACHE = Sampling(), CacheOptions()  # the defaults


def cache_and_others(options: Mapping[str, Any], own: Collection[str]) -> tuple[CacheOptions, dict[str, Any]]:
    """The cache options among keyword arguments, and the others, which are fields of `Sampling`.

    ``own``: the other arguments of the function, which a message may suggest. Raises `TypeError` for an unknown one.
    """
    of_cache, of_sampling = ({f.name for f in fields(kind)} for kind in (CacheOptions, Sampling))
    check_keywords(options, {*of_cache, *of_sampling, *own})
    kept = CacheOptions(**{name: value for name, value in options.items() if name in of_cache})
    return kept, {name: value for name, value in options.items() if name in of_sampling}


def count_tokens(
    prompts: Sequence[Sequence[int]], vocab_size: int, answers: Sequence[Sequence[int]] | None = None
) -> "np.ndarray":
    """What the penalties need to know of each text, [B, V] int32: 1 where the prompt has the token, and 2 more for each
    time that the answer has it."""
    import numpy as np

    counts = np.zeros((len(prompts), vocab_size), np.int32)
    for row, prompt in zip(counts, prompts, strict=True):
        row[list(prompt)] = 1
    for row, answer in zip(counts, answers or (), strict=False):
        np.add.at(row, np.array(answer, int), IN_ANSWER)
    return counts
