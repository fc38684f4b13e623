"""Readers of a text that comes in pieces: generators that are sent one character after the other, and "" at its end.

A reader gets single characters, so its result cannot depend on how the text was cut.
"""

from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Reader = Generator[None, str, T]
Put = Callable[[str], None]  # takes what was read


class Ended(Exception):
    """The text ended."""


class Unfinished(Ended):
    """The text ended in what may have become a call, and is lost."""


def one() -> Reader[str]:
    """The next character. Raises `Ended`."""
    char = yield
    if not char:
        raise Ended
    return char


def until(markers: tuple[str, ...], put: Put, first: str = "", rest: Put | None = None) -> Reader[str]:
    """Read up to the first of ``markers``, none of which begins another, and return it.

    Arguments:
        markers: what is looked for.
        put: called with all text before it.
        first: a character that was read already, or nothing.
        rest: called with the beginning of a marker at the end of the text; ``put`` by default.

    Raises:
        Ended: there is none.
    """
    starts = {marker[0] for marker in markers}
    held = ""
    char = first or (yield)
    while char:
        if held or char in starts:
            held += char
            while held and not any(marker.startswith(held) for marker in markers):
                put(held[0])
                held = held[1:]
            if held in markers:
                return held
        else:
            put(char)
        char = yield
    (rest or put)(held)
    raise Ended


class Block:
    """The text of a block that may be a call. It is held back; from the moment that it proves to be none, it is text.

    ``refused``: it is no call.
    """

    def __init__(self, text: Put, opening: str):
        self._text, self._held = text, [opening]
        self.refused = False

    def put(self, text: str) -> None:
        if self.refused:
            self._text(text)
        else:
            self._held.append(text)

    def refuse(self) -> None:
        if not self.refused:
            self.refused = True
            self._text(self.held)
            self._held.clear()

    @property
    def held(self) -> str:
        return "".join(self._held)
