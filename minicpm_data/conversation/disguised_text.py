"""Texts with hidden characters, which a chat template's tests see as the characters that they stand for.

The special tokens that a message spells out are hidden before the template is rendered (`Disguise`): their first
character is replaced, so that they stay text. But templates look into contents: is there a ``</think>``, is this a
``<tool_response>``, has an argument a ``<``? `DisguisedText` answers such questions from the shown text, and gives
its parts with the hidden characters in them. Both texts have the same length, so that positions are the same.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, SupportsIndex


class DisguisedText(str):
    """A text with hidden characters."""

    _shown: str

    @classmethod
    def of(cls, text: str, shown: str) -> "DisguisedText":
        """
        Arguments:
            text: with hidden characters.
            shown: with the characters that they stand for.
        """
        made = cls(text)
        made._shown = shown
        return made

    def _part(self, start: int, end: int) -> "DisguisedText":
        return DisguisedText.of(str.__getitem__(self, slice(start, end)), self._shown[start:end])

    def _placed(self, pieces: list[str], between: int | None) -> list[str]:
        """The parts of this text that read as ``pieces``; ``between`` characters between two, or spaces where None."""
        parts: list[str] = []
        at = 0
        for piece in pieces:
            at = self._shown.index(piece, at) if between is None else at
            parts.append(self._part(at, at + len(piece)))
            at += len(piece) + (between or 0)
        return parts

    def __str__(self) -> str:
        return self  # str(x), which filters of Jinja call, stays what it is

    def __repr__(self) -> str:
        """As of the shown text, whose length it does not have: Jinja writes lists of texts so."""
        quote = repr(self._shown)[0]
        chars = zip(str.__iter__(self), self._shown, strict=True)
        return quote + "".join(raw if raw != char else _escaped(char, quote) for raw, char in chars) + quote

    def __hash__(self) -> int:
        return hash(self._shown)

    def __eq__(self, other: object) -> bool:
        return self._shown == _shown(other)

    def __ne__(self, other: object) -> bool:
        return self._shown != _shown(other)

    def __lt__(self, other: str) -> bool:
        return self._shown < _shown(other)

    def __le__(self, other: str) -> bool:
        return self._shown <= _shown(other)

    def __gt__(self, other: str) -> bool:
        return self._shown > _shown(other)

    def __ge__(self, other: str) -> bool:
        return self._shown >= _shown(other)

    def __contains__(self, other: object) -> bool:
        return _shown(other) in self._shown

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        return DisguisedText.of(str.__getitem__(self, key), self._shown[key])

    def __iter__(self) -> Iterator[str]:
        return map(DisguisedText.of, str.__iter__(self), self._shown)

    def __add__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return DisguisedText.of(str.__add__(self, other), self._shown + _shown(other))

    def __radd__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return DisguisedText.of(str.__add__(other, self), _shown(other) + self._shown)

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        pieces = self._shown.split(_shown(sep), maxsplit)
        return self._placed(pieces, None if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        pieces = self._shown.rsplit(_shown(sep), maxsplit)
        return self._placed(pieces, None if sep is None else len(sep))

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._placed(self._shown.splitlines(True), 0)
        bare = self._shown.splitlines()
        return lines if keepends else [line[: len(short)] for line, short in zip(lines, bare, strict=True)]

    def partition(self, sep: str) -> tuple[str, str, str]:
        before, found, after = self._placed([*self._shown.partition(_shown(sep))], 0)
        return before, found, after

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        before, found, after = self._placed([*self._shown.rpartition(_shown(sep))], 0)
        return before, found, after

    def lstrip(self, chars: str | None = None) -> str:
        return self._part(len(self) - len(self._shown.lstrip(_shown(chars))), len(self))

    def rstrip(self, chars: str | None = None) -> str:
        return self._part(0, len(self._shown.rstrip(_shown(chars))))

    def strip(self, chars: str | None = None) -> str:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> str:
        return self._part(len(self) - len(self._shown.removeprefix(_shown(prefix))), len(self))

    def removesuffix(self, suffix: str) -> str:
        return self._part(0, len(self._shown.removesuffix(_shown(suffix))))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        text = str.join(new, self.split(old, count)) if old else str.replace(self, old, new, count)
        return DisguisedText.of(text, self._shown.replace(_shown(old), _shown(new), count))


def _shown(value: Any) -> Any:
    """The shown text of a text, of each of a tuple of texts; any other value unchanged."""
    if isinstance(value, tuple):
        return tuple(map(_shown, value))
    return value._shown if isinstance(value, DisguisedText) else value


def _escaped(char: str, quote: str) -> str:
    """A character in a `repr` between two of ``quote``."""
    return char if char in "'\"" and char != quote else f"\\{char}" if char == quote else repr(char)[1:-1]


def _asked(name: str) -> Callable[..., Any]:
    """A method that answers from the shown text."""
    of_str = getattr(str, name)
    return lambda self, *given: of_str(self._shown, *map(_shown, given))


def _changed(name: str) -> Callable[..., Any]:
    """A method that changes the case, which hidden characters do not have."""
    of_str = getattr(str, name)
    return lambda self: DisguisedText.of(of_str(self), of_str(self._shown))


for _name in ("startswith", "endswith", "find", "rfind", "index", "rindex", "count"):
    setattr(DisguisedText, _name, _asked(_name))
for _name in ("lower", "upper", "title", "capitalize", "casefold", "swapcase"):
    setattr(DisguisedText, _name, _changed(_name))


def disguised(value: Any, table: Mapping[int, str]) -> Any:
    """A JSON value in which each text with a hidden character is a `DisguisedText`, keys of objects too.

    Arguments:
        value: the JSON value.
        table: hidden code point -> the character that it stands for.
    """
    hidden, table = {chr(code) for code in table}, dict(table)

    def made(value: Any) -> Any:
        if isinstance(value, str):
            return value if hidden.isdisjoint(value) else DisguisedText.of(value, value.translate(table))
        if isinstance(value, dict):
            return {made(key): made(item) for key, item in value.items()}
        return [made(item) for item in value] if isinstance(value, list) else value

    return made(value)
