"""`GenerationRequest`: one frozen object for everything asked of a model, from the command line down to the device."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from minicpm_data.arguments import check_model, check_number
from minicpm_data.generation.constraint import Constraint
from minicpm_data.generation.options import (
    ANSWER_TOKENS,
    GREEDY,
    MOST,
    MOST_LOGPROBS,
    MOST_SPECIAL,
    PLAIN_CACHE,
    CacheOptions,
    Sampling,
)
from minicpm_data.generation.thinking import ThinkingBudget
from weights_io.errors import InputError, short

if TYPE_CHECKING:
    from minicpm_data.generation.prompt_cache import Prefix
    from minicpm_data.tokenizer.tokenizer import Tokenizer
    from weights_io.config import ModelConfig

Prompt = str | Sequence[int]


class LanguageModel(Protocol):
    """The attributes of a backend's model that shared code uses.

    ``eos_token_ids``: the EOS ids of config.json and generation_config.json.
    ``adapters``: the names of those of which each request may choose one.
    """

    config: "ModelConfig"
    eos_token_ids: tuple[int, ...]
    adapters: tuple[str, ...]


ModelT = TypeVar("ModelT", bound=LanguageModel)  # a backend's own class of models


IMAGE_IDS = 1 << 30  # first id of an image's tokens, beyond any vocabulary (`image_prompt`)


class PromptIds(tuple[int, ...]):
    """The token ids of a prompt, checked once. Several answers to one prompt share the object.

    Raises `InputError` where there is no id, or an id is outside the vocabulary.
    """

    def __new__(cls, ids: Iterable[int], vocab_size: int) -> "PromptIds":
        checked = super().__new__(cls, _whole(ids))
        if not checked:
            raise InputError("the prompt is empty; give at least one token.")
        for i in checked:
            if not 0 <= i < vocab_size:
                raise InputError(f"token id {i} of the prompt is outside the vocabulary of {vocab_size}.")
        return checked


def text_ids(ids: Sequence[int]) -> list[int]:
    """The ids with 0 in place of image tokens, for a model that does not see."""
    return [0 if i >= IMAGE_IDS else i for i in ids]


def _whole(ids: Iterable[int]) -> list[int]:
    """The ids as integers. Raises `InputError` where they are something else."""
    try:
        if isinstance(ids, bytes | bytearray):
            raise TypeError
        return [operator.index(i.item() if hasattr(i, "item") else i) for i in ids]
    except TypeError:
        raise InputError(
            f"the prompt is {short(repr(ids))}; give a text, or a list of token ids (whole numbers)."
        ) from None


def prompt_ids(tokenizer: "Tokenizer | None", prompt: Prompt, vocab_size: int) -> PromptIds:
    """The token ids of a prompt. A text is encoded with BOS and without a template; ids are only checked."""
    if isinstance(prompt, PromptIds):
        return prompt
    if not isinstance(prompt, str):
        return PromptIds(prompt, vocab_size)
    if tokenizer is None:
        raise InputError("a text prompt needs a tokenizer, and this checkpoint has none; give a list of token ids.")
    return PromptIds(tokenizer.encode(prompt), vocab_size)


def end_ids(model: LanguageModel, tokenizer: "Tokenizer | None") -> frozenset[int]:
    """The ids that end an answer: those of config.json, generation_config.json and the tokenizer together."""
    return frozenset([*model.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())])


def special_tokens_kept(
    sampling: Sampling, tokenizer: "Tokenizer | None", ends: frozenset[int], vocab_size: int
) -> Sampling:
    """``sampling`` with the ids that XTC keeps: the line break and ``ends``, where it names none.

    Raises `InputError` for an id outside the vocabulary, also in ``logit_bias``.
    """
    for i, _ in sampling.bias:
        if not 0 <= i < vocab_size:
            raise InputError(f"holds {i}, outside the vocabulary of {vocab_size}.", option="logit_bias")
    if not sampling.excludes:
        return sampling
    kept = sampling.xtc_special_tokens
    if kept is None:
        breaks = () if tokenizer is None else tokenizer.encode("\n")
        kept = tuple(sorted({*breaks, *ends}))[:MOST_SPECIAL]
    for i in kept:
        if not 0 <= i < vocab_size:
            raise InputError(f"holds {i}, outside the vocabulary of {vocab_size}.", option="xtc_special_tokens")
    return replace(sampling, xtc_special_tokens=tuple(kept))


@dataclass(frozen=True)
class GenerationRequest:
    """The prompts of a batch, and everything that determines the tokens generated from them.

    Arguments:
        prompts: the batch rows, of any lengths; exactly one in a request to an engine.
        max_tokens: most tokens of each answer.
        sampling: how each token is sampled.
        end_ids: tokens that end an answer.
        cache: the options of the key/value cache.
        prefix: the beginning of the prompt whose keys and values are in a file; for one prompt.
        thinking: the most tokens of each thought; None: any number.
        constraint: what the answer may be, in a request to an engine; None: anything.
        logprobs: how many of the likeliest tokens are described with each token, in a request to an engine; None: no
            probability is computed.
        adapter: 1 + the index in the model's ``adapters``, in a request to an engine; 0: none.

    Raises:
        InputError: a value is out of range. A request that exists need not be checked again.
    """

    prompts: tuple[PromptIds, ...]
    max_tokens: int = ANSWER_TOKENS
    sampling: Sampling = GREEDY
    end_ids: frozenset[int] = frozenset()
    cache: CacheOptions = PLAIN_CACHE
    prefix: "Prefix | None" = None
    thinking: ThinkingBudget | None = None
    constraint: Constraint | None = None
    adapter: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise InputError(f"is {self.logprobs}; it must be from 0 to {MOST_LOGPROBS}.", option="logprobs")
        check_number("max_tokens", self.max_tokens, whole=True)
        if not 1 <= self.max_tokens <= MOST:
            raise InputError(f"is {self.max_tokens}; it must be from 1 to {MOST}.", option="max_tokens")

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        tokenizer: "Tokenizer | None",
        prompts: Iterable[Prompt],
        max_tokens: int = ANSWER_TOKENS,
        sampling: Sampling = GREEDY,
        cache: CacheOptions = PLAIN_CACHE,
        thinking_budget: int | None = None,
    ) -> "GenerationRequest":
        """A request for prompts given as texts or ids, with the EOS ids of this model and tokenizer.

        ``thinking_budget``: most tokens of a thought; it is for chat templates that think.
        """
        check_model("model", model)
        rows = tuple(prompt_ids(tokenizer, prompt, model.config.vocab_size) for prompt in prompts)
        ends = end_ids(model, tokenizer)
        sampling = special_tokens_kept(sampling, tokenizer, ends, model.config.vocab_size)
        thinking = None if thinking_budget is None else ThinkingBudget.of(tokenizer, thinking_budget, rows)
        return cls(rows, max_tokens, sampling, ends, cache, thinking=thinking)

    @property
    def prompt(self) -> PromptIds:
        """The prompt of a request that has exactly one."""
        (only,) = self.prompts
        return only

    @property
    def begun(self) -> int:
        """Tokens of `prefix`, which are not run."""
        return 0 if self.prefix is None else self.prefix.length

    @property
    def longest(self) -> int:
        """Length of the longest prompt in tokens."""
        return max(map(len, self.prompts))
