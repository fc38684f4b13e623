"""What is asked of a model: one frozen object, made at the door and handed on as it is down to the device."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from minicpm_data.generation.options import ANSWER_TOKENS, GREEDY, MOST, PLAIN_CACHE, CacheOptions, Sampling
from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer
    from weights_io.config import ModelConfig

Prompt = str | Sequence[int]


class LanguageModel(Protocol):
    """What generation asks of a backend's model here, where nobody knows its arrays.

    ``eos_token_ids``: what config.json and generation_config.json say ends a text."""

    config: "ModelConfig"
    eos_token_ids: tuple[int, ...]


ModelT = TypeVar("ModelT", bound=LanguageModel)  # a backend's own class of models


class PromptIds(tuple[int, ...]):
    """The token ids of a prompt, all of them in a vocabulary of ``vocab_size``; `InputError` for others or none.

    Several answers to one prompt share it: it is neither checked nor copied again."""

    def __new__(cls, ids: Iterable[int], vocab_size: int) -> "PromptIds":
        checked = super().__new__(cls, (int(i) for i in ids))
        if not checked:
            raise InputError("the prompt is empty; give at least one token.")
        for i in checked:
            if not 0 <= i < vocab_size:
                raise InputError(f"token id {i} of the prompt is outside the vocabulary of {vocab_size}.")
        return checked


def prompt_ids(tokenizer: "Tokenizer | None", prompt: Prompt, vocab_size: int) -> PromptIds:
    """The ids of a prompt: a text gets BOS once and no template; ids are taken as they are."""
    if not isinstance(prompt, str):
        return PromptIds(prompt, vocab_size)
    if tokenizer is None:
        raise InputError("a text prompt needs a tokenizer, and this checkpoint has none; give a list of token ids.")
    return PromptIds(tokenizer.encode(prompt), vocab_size)


def end_ids(model: LanguageModel, tokenizer: "Tokenizer | None") -> frozenset[int]:
    """The ids that end an answer: the union of config.json, generation_config.json and the tokenizer."""
    return frozenset([*model.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())])


@dataclass(frozen=True)
class GenerationRequest:
    """Prompts that are answered together, and all that decides which tokens follow them.

    prompts: the rows of the batch, of any lengths; one in a request to an engine.
    max_tokens: most tokens of each answer.
    sampling: how each token is chosen.
    end_ids: tokens that end an answer.
    cache: what is kept of the tokens so far.

    Raises `InputError` for what is out of range: whoever holds a request need not check it again."""

    prompts: tuple[PromptIds, ...]
    max_tokens: int = ANSWER_TOKENS
    sampling: Sampling = GREEDY
    end_ids: frozenset[int] = frozenset()
    cache: CacheOptions = PLAIN_CACHE

    def __post_init__(self) -> None:
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
    ) -> "GenerationRequest":
        """That of prompts as a caller gives them, for answers that end where this model and tokenizer end a text."""
        rows = tuple(prompt_ids(tokenizer, prompt, model.config.vocab_size) for prompt in prompts)
        return cls(rows, max_tokens, sampling, end_ids(model, tokenizer), cache)

    @property
    def prompt(self) -> PromptIds:
        """The only one."""
        (only,) = self.prompts
        return only

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))
