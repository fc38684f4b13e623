"""A request in an engine, and a token that it got."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from minicpm_data.generation.constraint import Matcher
from minicpm_data.generation.pages import Row
from minicpm_data.generation.request import GenerationRequest, PromptIds
from minicpm_data.generation.thinking import Thought
from minicpm_data.generation.token_scores import TokenScore


@dataclass(eq=False)
class RequestState:
    """A request in the engine, with the tokens generated so far.

    Attributes:
        number: its id.
        request: what was asked; exactly one prompt.
        group: the id of its group; its own number where it has none.
        turn: order in the queue among groups that hold equally many slots; the lowest is next.
        generated: the token ids so far.
        row: the pages of the request; None while it is queued.
        thought: the thought, where the request has a thinking budget.
        matcher: the state of its constraint, where it has one.
        scores: of the next tokens to be recorded, where the request asks for probabilities.
    """

    number: int
    request: GenerationRequest
    group: int
    turn: int
    generated: list[int] = field(default_factory=list)
    row: Row | None = None
    thought: Thought | None = field(init=False, default=None)
    matcher: Matcher | None = field(init=False, default=None)
    scores: deque[TokenScore] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        if (budget := self.request.thinking) is not None:
            self.thought = Thought(budget, *budget.opened)
        if (constraint := self.request.constraint) is not None:
            self.matcher = constraint.begin()

    def look(self) -> None:
        """Let the thought and the constraint see the tokens so far."""
        for each in (self.thought, self.matcher):
            if each is not None:
                each.see(self.generated)

    def score(self, logprob: Any, ids: Any, logprobs: Any) -> None:
        """Take in the probabilities of a new token, in arrays of the host."""
        assert self.request.logprobs is not None
        self.scores.append(TokenScore.of(logprob, ids, logprobs, self.request.logprobs))

    @property
    def looks(self) -> bool:
        """Whether the next token depends on a look at all before it."""
        return self.matcher is not None or (self.thought is not None and not self.thought.over)

    @property
    def text(self) -> tuple[int, ...]:
        """Prompt and answer so far."""
        return (*self.request.prompt, *self.generated)

    @property
    def prompt(self) -> PromptIds:
        return self.request.prompt

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return self.request.max_tokens - len(self.generated)

    @property
    def finished(self) -> bool:
        return self.left == 0 or bool(self.generated and self.generated[-1] in self.request.end_ids)


@dataclass(frozen=True)
class GeneratedToken:
    """A token of the request with this number. ``last``: the request is finished. ``score``: its probability, where
    the request asks for it."""

    number: int
    token: int
    last: bool
    score: TokenScore | None = None
