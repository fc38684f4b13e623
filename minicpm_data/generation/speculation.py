"""Speculative decoding: guess the next tokens, run the model on all of them at once, and accept the right ones.

A decode step reads every weight for one token; a few tokens together cost hardly more. The result equals plain
decoding, token for token: every token is chosen from the model's own logits, with the same random key, and a guess is
only compared with it. Guesses come from a smaller draft model (arXiv 2211.17192) or from the text so far.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from minicpm_data.arguments import check_model, check_number
from minicpm_data.generation.request import IMAGE_IDS, GenerationRequest, ModelT, text_ids
from minicpm_data.generation.thinking import Thoughts
from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer

GRAMS = (4, 3, 2)  # n-gram lengths of prompt lookup, longest first
PAUSE = 15  # most tokens without a guess
MOST = 64  # most guesses at once; with more, a step is bound by arithmetic and not by reading weights
OTHERS = 0.01  # of the ids: at most so many of a draft model's may have other texts

Source = TypeVar("Source")  # a model, or the name that it is loaded from

# All tokens so far, the number of guesses wanted -> at most that many guesses.
Guess = Callable[[Sequence[int], int], Sequence[int]]
# Guesses -> the accepted ones, followed by one token that the model chose. A second argument is given where there are
# ids that come next, whatever the model chooses.
Verify = Callable[..., Sequence[int]]


@dataclass(frozen=True)
class Speculation(Generic[Source]):
    """The source of the guesses.

    Arguments:
        draft_model: a smaller model of the same backend and vocabulary. A bad one costs time and changes no token.
        prompt_lookup: guess from the text so far instead.
        num_draft_tokens: guesses at a time.

    Raises:
        InputError: a value is out of range, or both sources are given.
    """

    draft_model: Source | None = None
    prompt_lookup: bool = False
    num_draft_tokens: int = 3

    def __post_init__(self) -> None:
        count = self.num_draft_tokens
        check_number("num_draft_tokens", count, whole=True)
        if not 1 <= count <= MOST:
            raise InputError(f"is {count}; it must be a whole number from 1 to {MOST}.", option="num_draft_tokens")
        if self.draft_model is not None and self.prompt_lookup:
            raise InputError(
                "and {prompt_lookup} are two sources of guesses; leave one of them out.",
                "draft_model",
                ["prompt_lookup"],
            )

    @property
    def active(self) -> bool:
        return self.draft_model is not None or self.prompt_lookup

    def check(self: "Speculation[ModelT]", model: ModelT, request: GenerationRequest) -> None:
        """Raises `InputError` for a draft model of another vocabulary, or a cache that cannot be rewound."""
        if request.cache.max_kv_size is not None:
            raise InputError(
                "cannot rewind a wrong guess; leave it out, or leave out the speculation.", option="max_kv_size"
            )
        self.check_draft(model)

    def check_draft(self: "Speculation[ModelT]", model: ModelT) -> None:
        """Raises `InputError` for a draft model of another vocabulary."""
        if self.draft_model is not None:
            check_model("draft_model", self.draft_model)
            draft, own = self.draft_model.config.vocab_size, model.config.vocab_size
            if draft != own:
                raise InputError(f"the draft model has {draft} token ids, the model {own}; use one with its tokenizer.")


def check_tokenizers(own: "Tokenizer", draft: "Tokenizer", vocab_size: int) -> None:
    """Raises `InputError` where the ids of a draft model have other texts than those of the model. A few may: chat
    tokens often have other names."""
    pairs = zip(own.token_bytes(vocab_size), draft.token_bytes(vocab_size), strict=True)
    others = sum(one != other for one, other in pairs)
    if others > OTHERS * vocab_size:
        raise InputError(
            f"has another tokenizer: {others:,} of {vocab_size:,} token ids have other texts; use a model with the "
            "same one.",
            option="draft_model",
        )


class PromptLookup:
    """Guesses the tokens that followed the last occurrence of the latest n-gram in the text so far."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> the position after its last occurrence
        self._known = 1

    def __call__(self, tokens: Sequence[int], count: int) -> list[int]:
        for end in range(self._known, len(tokens)):
            for size in GRAMS:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._known = len(tokens)
        for size in GRAMS:
            start = self._after.get(tuple(tokens[-size:]))
            if start is not None:
                found = list(tokens[start : start + count])
                seen = next((i for i, token in enumerate(found) if token >= IMAGE_IDS), None)
                if seen is not None:  # no answer has tokens of an image
                    return found[:seen]
                while len(found) < count:  # the text repeats itself: so does the guess
                    found.append(found[start - len(tokens) + len(found)])
                return found
        return []


class Draft:
    """Guesses of a draft model.

    A backend's ``propose(last, start, count)`` rewinds the draft model's cache to its first ``start`` tokens, runs the
    tokens ``last``, and returns the ``count`` most likely next tokens.
    """

    def __init__(self, prompt: Sequence[int], propose: Callable[[Sequence[int], int, int], list[int]]):
        self._propose, self._held, self._sure = propose, list(prompt), len(prompt)

    def __call__(self, tokens: Sequence[int], count: int) -> list[int]:
        # The cached guesses that were accepted need not be run again; at least the last token is run.
        same = self._sure
        while same < min(len(self._held), len(tokens) - 1) and self._held[same] == tokens[same]:
            same += 1
        few = min(
            max(2, 1 << (len(tokens) - same - 1).bit_length()), len(tokens)
        )  # few sizes, so few programs are compiled
        start = len(tokens) - few
        found = self._propose(text_ids(tokens[start:]), start, count)
        self._held, self._sure = [*tokens, *found[:-1]], len(tokens)
        return found


def speculate(
    request: GenerationRequest, first: int, guess: Guess, verify: Verify, count: int
) -> Iterator[tuple[int, bool]]:
    """Generate an answer from guesses.

    After a round without an accepted guess, guessing pauses for 1, 3, 7 and at most `PAUSE` tokens.

    Arguments:
        request: the request, with one prompt.
        first: the first token of the answer.
        guess, verify: the functions of the backend.
        count: guesses at a time.

    Returns:
        An iterator over the tokens, each with whether it was an accepted guess.
    """
    prompt, max_tokens, end_ids = request.prompt, request.max_tokens, request.end_ids
    tokens = [*prompt, first]
    thoughts = Thoughts(request.thinking, end_ids)
    thoughts.add([first])
    yield first, False
    pause = idle = 0
    while (left := max_tokens - (len(tokens) - len(prompt))) > 0 and tokens[-1] not in end_ids:
        forced = thoughts.rows[0].forced if thoughts.rows else ()
        most = min(count, left - 1, thoughts.free - 1)  # a thought is looked at after all of them
        guesses = forced[:most] if forced else guess(tokens, most) if most > 0 and not idle else []
        chosen = verify(guesses, forced) if forced else verify(guesses)
        if forced:
            pass  # nothing was guessed
        elif guesses:
            pause = idle = 0 if len(chosen) > 1 else min(2 * pause + 1, PAUSE)
        else:
            idle = max(idle - 1, 0)
        for index, token in enumerate(chosen):
            tokens.append(token)
            thoughts.add([token])
            yield token, index < len(chosen) - 1 and not forced
            if token in end_ids:
                return
