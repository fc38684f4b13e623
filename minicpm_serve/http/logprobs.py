"""The probabilities of tokens in OpenAI's two forms: lists of a completion, and the entries of a chat."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from minicpm_data.generation.token_scores import TokenScore
from minicpm_data.tokenizer.tokenizer import Tokenizer

LEAST = -9999.0  # in place of less, as OpenAI does; JSON has no infinity


class TokenLog(ABC):
    """The tokens of an answer whose probabilities have not been sent yet."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens = list[tuple[int, TokenScore | None]]()

    def add(self, token: int, score: TokenScore | None) -> None:
        """Append a token. The first one of a prompt has no probability."""
        self._tokens.append((token, score))

    def take(self) -> dict[str, Any] | None:
        """The JSON of the tokens since the last call; None where there is none."""
        tokens, self._tokens = self._tokens, []
        return self._json(tokens) if tokens else None

    @abstractmethod
    def _json(self, tokens: Sequence[tuple[int, TokenScore | None]]) -> dict[str, Any]: ...


class ChatLog(TokenLog):
    """The entries of a chat. A token that ends the answer has no place in its text, and no entry."""

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int]):
        super().__init__(tokenizer)
        self._ends = ends

    def add(self, token: int, score: TokenScore | None) -> None:
        if token not in self._ends:
            super().add(token, score)

    def _json(self, tokens: Sequence[tuple[int, TokenScore | None]]) -> dict[str, Any]:
        entries = []
        for token, score in tokens:
            if score is not None:
                others = [self._entry(each, value) for each, value in score.likeliest]
                entries.append({**self._entry(token, score.logprob), "top_logprobs": others})
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._tokenizer.piece(token)
        return {"token": text_of(piece), "logprob": finite(logprob), "bytes": list(piece)}


class TextLog(TokenLog):
    """The lists of a completion. ``text_offset`` is where a token begins in the text, in characters."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        self._detokenizer, self._offset = tokenizer.detokenizer(), 0

    def _json(self, tokens: Sequence[tuple[int, TokenScore | None]]) -> dict[str, Any]:
        names, offsets, logprobs, likeliest = [], [], list[float | None](), list[dict[str, float] | None]()
        for token, score in tokens:
            names.append(self._name(token))
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.add(token))
            logprobs.append(None if score is None else finite(score.logprob))
            likeliest.append(None if score is None else self._likeliest(token, score))
        return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": likeliest, "text_offset": offsets}

    def _likeliest(self, token: int, score: TokenScore) -> dict[str, float]:
        """The likeliest tokens and the token itself. Of tokens with one text, the likelier one is there."""
        found: dict[str, float] = {}
        for each, value in (*score.likeliest, (token, score.logprob)):
            found.setdefault(self._name(each), finite(value))
        return found

    def _name(self, token: int) -> str:
        return text_of(self._tokenizer.piece(token))


def text_of(piece: bytes) -> str:
    """The text of a token; of a part of a character its bytes, as ``bytes:\\xe4\\xbd``."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def finite(logprob: float) -> float:
    return LEAST if math.isnan(logprob) else max(logprob, LEAST)
