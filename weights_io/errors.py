"""The one error style: what the user gave cannot be used, said in one sentence that names the thing and the remedy."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

MOST_NAMES = 3  # that a message quotes; the rest is a count
LONGEST_NAME = 80  # characters of a name that is quoted
LONGEST_MESSAGE = 2000
# What would break a line or turn a terminal's text around: control characters, line separators, halves of characters.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """A file, flag, request or data line of the user's that cannot be used.

    The message is one sentence. Command lines print it after ``error:`` and exit with status 2, without a traceback;
    library callers catch it as a ``ValueError``, and a notebook shows the sentence alone. Whatever it quotes, it stays
    one line of bounded length.

    Arguments:
        message: the sentence; with ``option``, what follows the option's name in it.
        option: the option that it is about, as Python has it: ``top_p``. The sentence begins with its name, which a
            command line shows as the flag (`spelled`) and a server as the field of the request.
        others: more options, which the message names in braces: ``does not go with {top_k}``.
    """

    def __init__(self, message: str, option: str | None = None, others: Iterable[str] = ()) -> None:
        self.option, self._template, self._others = option, message, tuple(others)
        super().__init__(self.spelled(str))

    def spelled(self, name: Callable[[str], str]) -> str:
        """The sentence with each option that it names as ``name`` has it, such as `flag`."""
        message = self._template
        for other in self._others:
            message = message.replace(f"{{{other}}}", name(other))
        if self.option is not None:
            message = f"{name(self.option)} {message}"
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE // 2]} ... {message[-LONGEST_MESSAGE // 2 :]}"
        return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", message)

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in place of a traceback."""
        return [f"error: {self}"]


def flag(name: str) -> str:
    """``--top-p``: how the option of that field is typed."""
    return "--" + name.replace("_", "-")


def not_utf8(what: object, error: UnicodeDecodeError, remedy: str = "convert it first") -> InputError:
    """That ``what``, a file or the like, is no text."""
    return InputError(f"{what} is not UTF-8 text (byte {error.start}); {remedy}.")


def short(name: object) -> str:
    """A name that a file gives, as a message quotes it."""
    text = str(name)
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3]}..."


def listed(names: Iterable[object], most: int = MOST_NAMES, last: str = ", ") -> str:
    """``a, b, c and 5 more``. ``last``: what stands before the last one where all are named."""
    every = list(names)
    quoted = [short(name) for name in every[:most]]
    if len(every) > most:
        return f"{', '.join(quoted)} and {len(every) - most} more"
    return last.join([", ".join(quoted[:-1]), *quoted[-1:]] if quoted[1:] else quoted)


def shown(value: Any) -> str:
    """A value of a JSON file as a message quotes it: short, whatever it is."""
    text = ""
    for part in json.JSONEncoder(ensure_ascii=False).iterencode(value):
        text += part
        if len(text) > LONGEST_NAME:
            break
    return short(text)
