"""The error for bad input: one sentence that names the thing and the remedy. Helpers to quote names and values."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

MOST_NAMES = 3  # names that a message quotes; the others are counted
LONGEST_NAME = 80  # characters of a quoted name
LONGEST_MESSAGE = 2000  # characters
# Characters that would break a line or reverse a terminal's text: controls, line separators, lone surrogates.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """A file, flag, request or data line of the user that cannot be used.

    The message is one sentence, on one line of bounded length. Command lines print it after ``error:`` and exit with
    status 2, without a traceback. Library callers catch it as a ``ValueError``. A notebook shows only the sentence.

    Arguments:
        message: the sentence; with ``option``, the part after the option's name.
        option: the option that is wrong, as Python spells it: ``top_p``. The sentence begins with its name. A command
            line shows it as the flag (`spelled`), a server as the field of the request.
        others: further options that the message names in braces: ``does not go with {top_k}``.
    """

    def __init__(self, message: str, option: str | None = None, others: Iterable[str] = ()) -> None:
        self.option, self._template, self._others = option, message, tuple(others)
        super().__init__(self.spelled(str))

    def spelled(self, name: Callable[[str], str]) -> str:
        """The sentence, with ``name`` (such as `flag`) applied to each option that it names."""
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
    """The flag of an option: ``top_p`` -> ``--top-p``."""
    return "--" + name.replace("_", "-")


def not_utf8(what: object, error: UnicodeDecodeError, remedy: str = "convert it first") -> InputError:
    """The error for a file that is not UTF-8 text.

    Arguments:
        what: the file, as the message names it.
        error: the error of the decoder.
        remedy: what the user can do.
    """
    return InputError(f"{what} is not UTF-8 text (byte {error.start}); {remedy}.")


def short(name: object) -> str:
    """A name from a file, cut to `LONGEST_NAME` characters for a message."""
    text = str(name)
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3]}..."


def listed(names: Iterable[object], most: int = MOST_NAMES, last: str = ", ") -> str:
    """A list of names for a message: ``a, b, c and 5 more``.

    Arguments:
        names: all names.
        most: the largest number of names to quote; the others are counted.
        last: the separator before the last name if all are quoted.
    """
    every = list(names)
    quoted = [short(name) for name in every[:most]]
    if len(every) > most:
        return f"{', '.join(quoted)} and {len(every) - most} more"
    return last.join([", ".join(quoted[:-1]), *quoted[-1:]] if quoted[1:] else quoted)


def shown(value: Any) -> str:
    """A value from a JSON file as JSON text, cut to `LONGEST_NAME` characters for a message."""
    text = ""
    for part in json.JSONEncoder(ensure_ascii=False).iterencode(value):
        text += part
        if len(text) > LONGEST_NAME:
            break
    return short(text)
