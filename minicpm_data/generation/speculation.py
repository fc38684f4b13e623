"""Speculative decoding: guess the next tokens, run the model over all of them at once, keep those it would have chosen.

A decode step reads every weight for one token; a few tokens together cost hardly more. What is kept is what plain
decoding gives, token for token: each is chosen from the model's own logits, with the same key where it is drawn, and a
guess is only ever compared with it. Guesses come from a smaller model (arXiv 2211.17192) or from the text so far.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from minicpm_data.generation.request import GenerationRequest, ModelT
from weights_io.errors import InputError

GRAMS = (4, 3, 2)  # tokens that must have been seen together for the text after them to be a guess; longest first
PAUSE = 15  # most tokens without a guess
MOST = 64  # guesses at once: beyond, arithmetic and not the reading of weights would decide

Source = TypeVar("Source")  # a model, or what it is loaded from: the name that a command is given

# All tokens so far, and how many are wanted -> at most so many that may follow.
Guess = Callable[[Sequence[int], int], Sequence[int]]
# Guesses -> the tokens that the model chooses: those of the guesses that it agrees with, and one of its own.
Verify = Callable[[Sequence[int]], Sequence[int]]


@dataclass(frozen=True)
class Speculation(Generic[Source]):
    """Where guesses come from: ``draft_model`` (of the same backend and vocabulary, which is not checked further: a
    wrong one costs time, never a token) or the text so far (``prompt_lookup``), ``num_draft_tokens`` at a time."""

    draft_model: Source | None = None
    prompt_lookup: bool = False
    num_draft_tokens: int = 3

    def __post_init__(self) -> None:
        count = self.num_draft_tokens
        if count != int(count) or not 1 <= count <= MOST:
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
        """`InputError` for a draft of another vocabulary, or a cache that cannot be taken back."""
        if request.cache.max_kv_size is not None:
            raise InputError("cannot take back a wrong guess; leave it out, or the guessing.", option="max_kv_size")
        if self.draft_model is not None:
            draft, own = self.draft_model.config.vocab_size, model.config.vocab_size
            if draft != own:
                raise InputError(f"the draft model has {draft} token ids, the model {own}; take one of its tokenizer.")


class PromptLookup:
    """Guesses by the text so far: what followed the last few tokens when they stood there before."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # tokens -> where the text goes on after their last appearance
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
                while len(found) < count:  # the text repeats itself: so does the guess
                    found.append(found[start - len(tokens) + len(found)])
                return found
        return []


class Draft:
    """Guesses of a smaller model. A backend's ``propose(last, start, count)`` takes the model's cache back to its first
    ``start`` tokens, runs the ``last`` ones after them, and returns the likeliest ``count`` that follow."""

    def __init__(self, prompt: Sequence[int], propose: Callable[[Sequence[int], int, int], list[int]]):
        self._propose, self._held, self._sure = propose, list(prompt), len(prompt)

    def __call__(self, tokens: Sequence[int], count: int) -> list[int]:
        # What of the guesses that the cache holds became text; at least the last token is run, for what follows it.
        same = self._sure
        while same < min(len(self._held), len(tokens) - 1) and self._held[same] == tokens[same]:
            same += 1
        few = min(max(2, 1 << (len(tokens) - same - 1).bit_length()), len(tokens))  # of few sizes: few programs
        start = len(tokens) - few
        found = self._propose(tokens[start:], start, count)
        self._held, self._sure = [*tokens, *found[:-1]], len(tokens)
        return found


def speculate(
    request: GenerationRequest, first: int, guess: Guess, verify: Verify, count: int
) -> Iterator[tuple[int, bool]]:
    """The tokens of an answer that begins with ``first``, and whether each was guessed; ``count`` guesses at a time.
    While none is right, guessing pauses for 1, 3, 7 and at last `PAUSE` tokens: it costs most where it is of no use."""
    prompt, max_tokens, end_ids = request.prompt, request.max_tokens, request.end_ids
    tokens = [*prompt, first]
    yield first, False
    pause = idle = 0
    while (left := max_tokens - (len(tokens) - len(prompt))) > 0 and tokens[-1] not in end_ids:
        guesses = guess(tokens, min(count, left - 1)) if left > 1 and not idle else []
        chosen = verify(guesses)
        if guesses:
            pause = idle = 0 if len(chosen) > 1 else min(2 * pause + 1, PAUSE)
        else:
            idle = max(idle - 1, 0)
        for index, token in enumerate(chosen):
            tokens.append(token)
            yield token, index < len(chosen) - 1
            if token in end_ids:
                return
