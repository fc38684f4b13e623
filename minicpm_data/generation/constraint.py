"""A constraint on an answer: a grammar that the text must follow, held token by token.

Before each token the grammar says which tokens may come next, as bits; the backends give the others a probability of 0.
The grammars are those of `llguidance`, an extension of Lark's with regular expressions and JSON schemas.

Dims: V vocabulary, W = V / 32 rounded up.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer

BITS = 32  # tokens in a word of a mask
ALL = np.uint32(0xFFFFFFFF)
LONGEST = 200_000  # characters of a grammar; compiling takes about 1 s for each 100,000
BEGUN = "\x01"  # no token joins it with other text


@dataclass(frozen=True, eq=False)
class Constraint:
    """A compiled grammar for one vocabulary.

    Arguments:
        matcher: of `llguidance`, at the beginning of the text.
        words: W.
        end_ids: the tokens that end an answer.
    """

    matcher: Any
    words: int
    end_ids: frozenset[int]

    @staticmethod
    def of(grammar: str, tokenizer: "Tokenizer", vocab_size: int, end_ids: frozenset[int], what: str) -> "Constraint":
        """Compile a grammar.

        Arguments:
            grammar: in the Lark form of `llguidance`.
            tokenizer: of the model.
            vocab_size: V, the rows of the model's head.
            end_ids: the tokens that end an answer.
            what: the option that the grammar is made of, for errors.

        Raises:
            InputError: `llguidance` is not installed or cannot compile the grammar, or no token ends an answer.
        """
        if find_spec("llguidance") is None:
            raise InputError("needs llguidance: pip install 'minicpm-jax-mlx[serve]'.", option=what)
        if not end_ids:
            raise InputError("needs a model with an EOS token, and this one has none; leave it out.", option=what)
        if len(grammar) > LONGEST:
            raise InputError(f"makes a grammar of {len(grammar):,} characters, above {LONGEST:,}; shorten it.", what)
        from llguidance import LLMatcher

        matcher = LLMatcher(_vocabulary(tokenizer, vocab_size, end_ids), grammar, log_level=0)
        if matcher.is_error():
            raise InputError(f"cannot be held by a grammar ({_reason(matcher.get_error())}); simplify it.", option=what)
        return Constraint(matcher, -(-vocab_size // BITS), end_ids)

    def begin(self) -> "Matcher":
        """The state of a new answer."""
        return Matcher(self.matcher.deep_copy(), self.words, self.end_ids)


class Matcher:
    """How far an answer has come in its grammar."""

    def __init__(self, matcher: Any, words: int, end_ids: frozenset[int]):
        self._matcher, self._seen = matcher, 0
        self._ends = np.zeros(words, np.uint32)
        for i in end_ids:
            self._ends[i // BITS] |= np.uint32(1 << i % BITS)

    def see(self, generated: Sequence[int]) -> None:
        """Take in the new ones of the tokens of the answer so far."""
        for token in generated[self._seen :]:
            self.add(token)

    def add(self, token: int) -> None:
        """Take in the next token of the answer."""
        self._seen += 1
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, [W] uint32, the lowest bit first. After the end of the text, or an error of
        the grammar, those that end the answer."""
        if self._matcher.is_stopped():
            return self._ends
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        mask = np.zeros(len(self._ends), np.uint32)
        mask[: len(found)] = found[: len(mask)]
        return mask if mask.any() else self._ends


def allowed_rows(matchers: Sequence[Matcher | None], vocab_size: int) -> np.ndarray:
    """The tokens that may come next in each row, [B, W] uint32; all where a row has no constraint."""
    rows = np.full((len(matchers), -(-vocab_size // BITS)), ALL, np.uint32)
    for row, matcher in zip(rows, matchers, strict=True):
        if matcher is not None:
            row[:] = matcher.allowed()
    return rows


def unpacked(mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """A mask [W] as [V] booleans."""
    return np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little")[:vocab_size].astype(bool)


@functools.lru_cache(maxsize=2)
def _vocabulary(tokenizer: "Tokenizer", vocab_size: int, end_ids: frozenset[int]) -> Any:
    """The `LLTokenizer` of a model. Making one takes about 0.5 s for 100,000 tokens."""
    from llguidance import LLTokenizer, TokenizerWrapper

    first, *_ = ends = sorted(end_ids)

    class Vocabulary:
        eos_token_id, bos_token_id = first, tokenizer.bos_token_id
        tokens = tokenizer.token_bytes(vocab_size)
        special_token_ids = [i for i, token in enumerate(tokens) if token[:1] == b"\xff"]

        def __call__(self, text: str | bytes) -> list[int]:
            """The ids of a text in the middle of another one."""
            text = text if isinstance(text, str) else text.decode(errors="replace")
            before = len(tokenizer.encode(BEGUN, add_bos=False))
            return tokenizer.encode(BEGUN + text, add_bos=False)[before:]

    return LLTokenizer(TokenizerWrapper(Vocabulary()), n_vocab=vocab_size, eos_token=ends)


def _reason(error: str) -> str:
    """The first line of an error of `llguidance` that says what is wrong."""
    lines = [line.strip() for line in error.splitlines() if line.strip() and "|" not in line[:8]]
    return (lines[0].partition(": ")[2] or lines[0]).rstrip(".:") if lines else "unknown"
