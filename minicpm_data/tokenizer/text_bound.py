"""A lower bound of a text's token count, without encoding it: a text that is much too long is refused at no cost."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minicpm_data.tokenizer.detokenizer import BYTE_OF_CHAR, BYTE_TOKENS

if TYPE_CHECKING:
    from minicpm_data.tokenizer.fast_tokenizer import FastTokenizer
    from minicpm_data.tokenizer.tokenizer import Tokenizer

# Normalizer -> most characters of a text that it composes into one; U+1F82 is composed of 4.
SHRINKS = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Prepend": 1, "Lowercase": 1}
KEEPS = ("ByteLevel", "Metaspace", "Digits", "Split", "Punctuation")  # pre-tokenizers that drop no character
LOSSY = 64  # least `per_token` where the tokenizer drops characters, and so could make any text short


@dataclass(frozen=True)
class TextBound:
    """A lower bound of the number of tokens.

    Attributes:
        per_token: most characters that one token stands for.
        spaces: whether white space counts as characters. It does not where the tokenizer may drop it.
    """

    per_token: int
    spaces: bool = True

    @staticmethod
    def of(tokenizer: "Tokenizer") -> "TextBound":
        """The bound for a tokenizer."""
        fast = tokenizer.fast
        pre_tokenizers = _steps(fast.pre_tokenizer, "pretokenizers")
        byte_level = any(step["type"] == "ByteLevel" for step in pre_tokenizers)
        added = fast.added_tokens().values()
        own = max((_characters(piece, byte_level) for piece in fast.vocabulary(added=False)), default=1)
        longest = max([own, 1, *(len(token.content) for token in added)])
        spaces = not any(token.lstrip or token.rstrip for token in added)
        shrinks = [_shrinks(step) for step in _steps(fast.normalizer, "normalizers")]
        dropping = [step for step in pre_tokenizers if not _keeps(step)]
        if None in shrinks or dropping or not _spells_everything(fast, byte_level):
            return TextBound(max(longest, LOSSY), False)
        for factor in shrinks:
            longest *= factor or 1
        return TextBound(longest, spaces)

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of ``text``: no encoding of it has fewer."""
        counted = len(text) if self.spaces else sum(map(len, text.split()))
        return -(-counted // self.per_token)


def _characters(piece: str, byte_level: bool) -> int:
    """Characters that a piece stands for. In a byte-level piece, each byte that starts a character counts as one."""
    if not byte_level:
        return 1 if piece in BYTE_TOKENS else len(piece)
    return sum(BYTE_OF_CHAR.get(char, 0) & 0xC0 != 0x80 for char in piece)


def _steps(spec: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, without nesting. ``several`` is the key of a sequence's steps."""
    if spec is None:
        return []
    return [step for part in spec[several] for step in _steps(part, several)] if spec["type"] == "Sequence" else [spec]


def _shrinks(step: dict) -> int | None:
    """The largest factor by which a normalizer can reduce the characters of a text; None: there is no limit."""
    match step:
        case {"type": "Replace", "pattern": {"String": old}, "content": new} if len(new) >= len(old):
            return 1
        case {"type": kind}:
            return SHRINKS.get(kind)
    return None


def _keeps(step: dict) -> bool:
    """Whether a pre-tokenizer drops no character."""
    return step["type"] in KEEPS and step.get("behavior") != "Removed"


def _spells_everything(fast: "FastTokenizer", byte_level: bool) -> bool:
    """Whether each character is part of a token. Otherwise a run of unknown characters can be one token or none."""
    if byte_level or fast.model.byte_fallback:
        pieces = BYTE_OF_CHAR if byte_level else BYTE_TOKENS
        return all(fast.token_to_id(piece) is not None for piece in pieces)
    return fast.model.unk_token is not None and not fast.model.fuse_unk
