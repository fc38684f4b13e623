"""A thinking budget: after so many tokens of a thought, the tokens that close it are forced, and the answer begins.

The thought is found in the text, not in the ids, because in MiniCPM4.1 ``<think>`` is plain text of several tokens. A
backend asks before each call of its decode loop how many tokens it may sample (`Thought.free`), and which ones it must
take in place of sampled ones (`Thought.forced`).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minicpm_data.arguments import check_number
from minicpm_data.conversation.answers import THINK, THINK_END, AnswerParser
from minicpm_data.conversation.template_features import opens_thought
from minicpm_data.generation.options import MOST
from weights_io.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from minicpm_data.tokenizer.detokenizer import Detokenizer
    from minicpm_data.tokenizer.tokenizer import Tokenizer

CLOSING = f"\n{THINK_END}\n\n"  # as the templates write the end of a thought
TAIL = 32  # last tokens of a prompt, which hold the tag that it may end with


def thinks(tokenizer: "Tokenizer | None") -> bool:
    """Whether the chat template lets the model think, or not, by ``enable_thinking``."""
    return tokenizer is not None and tokenizer.features.thinking


def check_thinks(tokenizer: "Tokenizer | None", option: str) -> None:
    """Raises `InputError` about ``option`` where there is no template that thinks."""
    if not thinks(tokenizer):
        raise InputError("is for models whose chat template has a thinking mode; leave it out.", option=option)


def in_thought(tokenizer: "Tokenizer", prompt: Sequence[int]) -> bool:
    """Whether a prompt ends in an open thought."""
    return opens_thought(tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False))


def parser_of(tokenizer: "Tokenizer | None", prompt: Sequence[int]) -> AnswerParser | None:
    """The parser that separates the thought of an answer to ``prompt``; None where the chat template has no thoughts.

    A template is only rendered, to find out what it supports, if its text has to do with thoughts.
    """
    if tokenizer is None or not any(word in tokenizer.chat_template for word in ("think", "thought", "reasoning")):
        return None
    features = tokenizer.features
    if not features.thinking and features.thought_key is None:
        return None
    return AnswerParser(call_form=features.call_form, in_thought=in_thought(tokenizer, prompt))


@dataclass(frozen=True)
class ThinkingBudget:
    """The most tokens of a thought, and what is needed to end it.

    Arguments:
        tokens: the tokens after which an open thought is closed, counted after ``<think>``. Where the text then ends
            with the beginning of ``</think>``, the model may finish it.
        closing: the ids of `CLOSING`.
        opened: for each prompt, whether it ends in an open thought.
        detokenizer: makes a detokenizer that keeps special tokens.
    """

    tokens: int
    closing: tuple[int, ...]
    opened: tuple[bool, ...]
    detokenizer: "Callable[[], Detokenizer]"

    @staticmethod
    def of(tokenizer: "Tokenizer | None", tokens: int, prompts: Sequence[Sequence[int]]) -> "ThinkingBudget":
        """The budget of a request. Raises `InputError` for a number out of range, or a template that never thinks."""
        check_budget(tokens)
        check_thinks(tokenizer, "thinking_budget")
        assert tokenizer is not None
        opened = tuple(in_thought(tokenizer, prompt) for prompt in prompts)
        return ThinkingBudget(
            tokens, _closing(tokenizer), opened, lambda: tokenizer.detokenizer(skip_special_tokens=False)
        )


def check_budget(tokens: int) -> None:
    """Raises `InputError` for a thinking budget that is no whole number from 0 on."""
    check_number("thinking_budget", tokens, whole=True)
    if not 0 <= tokens <= MOST:
        raise InputError(f"is {tokens}; it must be a whole number from 0 to {MOST}.", option="thinking_budget")


def _closing(tokenizer: "Tokenizer") -> tuple[int, ...]:
    """The ids of `CLOSING` after other text: a SentencePiece tokenizer would put a space before a first text."""
    before, whole = (tokenizer.encode(text, add_bos=False) for text in ("x", f"x{CLOSING}"))
    joined = whole[: len(before)] != before  # a token spans the boundary
    return tuple(tokenizer.encode(CLOSING, add_bos=False) if joined else whole[len(before) :])


class Thought:
    """The thought of one answer, token by token.

    Attributes:
        forced: the ids that come next, whatever is sampled.
    """

    def __init__(self, budget: ThinkingBudget, opened: bool):
        self.forced: tuple[int, ...] = ()
        self._budget, self._decoder = budget, budget.detokenizer()
        self._open: bool | None = True if opened else None  # None: undecided. False: closed, or there is none
        self._count = 0  # tokens of the thought
        self._text = ""  # the end of the text, which may be the beginning of a tag
        self._seen = 0
        self._look()

    @property
    def over(self) -> bool:
        """Whether there is nothing left to look at."""
        return self._open is False and not self.forced

    @property
    def free(self) -> int:
        """Tokens, at least 1, that may come before the next look at `forced`."""
        if self._open is False or self.forced:
            return MOST
        return self._budget.tokens + 1 if self._open is None else max(1, self._budget.tokens - self._count)

    def see(self, generated: Sequence[int]) -> None:
        """Take in the new ones of the tokens of the answer so far."""
        for token in generated[self._seen :]:
            self.add(token)

    def add(self, token: int, last: bool = False) -> None:
        """Take in the next token of the answer. ``last``: it ends the answer."""
        self._seen += 1
        if self.forced:
            self._open, self.forced = False, self.forced[1:]
        if last:
            self._open, self.forced = False, ()
        if self._open is False:
            return
        self._text += self._decoder.add(token)
        if self._open is None:
            begun = self._text.lstrip()
            if begun.startswith(THINK):
                self._open, self._text = True, begun[len(THINK) :]
                self._look()
            elif not THINK.startswith(begun):
                self._open = False
        else:
            self._count += 1
            self._look()

    def _look(self) -> None:
        """Whether the open thought has ended, or has to."""
        if not self._open:
            return
        if THINK_END in self._text:
            self._open = False
            return
        begun = next((n for n in range(len(THINK_END) - 1, 0, -1) if self._text.endswith(THINK_END[:n])), 0)
        self._text = self._text[len(self._text) - begun :]
        if not begun and self._count >= self._budget.tokens:
            self.forced = self._budget.closing


class Thoughts:
    """The thoughts of a batch. Without a budget there are none, and nothing is forced."""

    def __init__(self, budget: ThinkingBudget | None, end_ids: Collection[int] = ()):
        self.rows = [] if budget is None else [Thought(budget, opened) for opened in budget.opened]
        self._ends = end_ids

    def add(self, step: "Sequence[int] | np.ndarray") -> None:
        """Take in the next token of each row, [B]."""
        for thought, token in zip(self.rows, map(int, step), strict=False):
            thought.add(token, token in self._ends)

    @property
    def free(self) -> int:
        """Steps that may come before the next look at `forced`."""
        return min((thought.free for thought in self.rows), default=MOST)

    def forced(self, steps: int) -> "np.ndarray | None":
        """`forced_steps` of the rows; None without a budget."""
        return forced_steps(self.rows, steps) if self.rows else None


def forced_steps(thoughts: Sequence[Thought | None], steps: int) -> "np.ndarray":
    """The ids that rows are forced to in their next steps, [steps, B] int32; -1 where a token is sampled."""
    import numpy as np

    forced = np.full((steps, len(thoughts)), -1, np.int32)
    for row, thought in enumerate(thoughts):
        ids = () if thought is None else thought.forced[:steps]
        forced[: len(ids), row] = ids
    return forced
