"""Values as models write them: JSON, and Python literals with JSON's words. Text of a model is never executed.

The reader takes linear time. Values that JSON cannot hold (NaN, infinities, bytes, sets) are no literals here.
"""

import json
import math
import re
import unicodedata
from typing import Any

DEEPEST = 100  # nested lists and objects; readers of JSON in other languages stop at 64 to 512
MOST_BITS = 14_000  # of an integer; Python itself reads and writes 4,300 decimal digits

WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
NAME = re.compile(r"[^\W\d]\w*")
BLANK = re.compile(r"(?:\s|\\\n|#[^\n]*)*")
BASED = re.compile(r"0(?:[xX](?:_?[0-9a-fA-F])+|[oO](?:_?[0-7])+|[bB](?:_?[01])+)")
DECIMAL = re.compile(r"(?:\d(?:_?\d)*\.?(?:\d(?:_?\d)*)?|\.\d(?:_?\d)*)(?:[eE][+-]?\d(?:_?\d)*)?", re.ASCII)
STRING = re.compile(r"([rRuU]?)('''|\"\"\"|'|\")")
ENDS = {
    "'": re.compile(r"(?:[^\\'\n]|\\.)*+'", re.DOTALL),
    '"': re.compile(r'(?:[^\\"\n]|\\.)*+"', re.DOTALL),
    "'''": re.compile(r"(?:[^\\']|\\.|'(?!''))*+'''", re.DOTALL),
    '"""': re.compile(r'(?:[^\\"]|\\.|"(?!""))*+"""', re.DOTALL),
}
ESCAPE = re.compile(
    r"\\(?:(\n)|([\\'\"abfnrtv])|([0-7]{1,3})|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|N\{([^}]*)\}|([xuUN]))"
)
SIMPLE = dict(zip("\\'\"abfnrtv", "\\'\"\a\b\f\n\r\t\v", strict=True))
LONE = re.compile("[\ud800-\udfff]")


class NoLiteral(ValueError):
    """The text is no value."""


def json_value(text: str) -> Any:
    """The value of a JSON text. Raises `NoLiteral`."""
    try:
        value = json.loads(text, parse_constant=_refused)
    except (ValueError, RecursionError):
        raise NoLiteral from None
    return checked(value)


def python_value(text: str) -> Any:
    """The value of a Python literal, with JSON's words too. Raises `NoLiteral`."""
    reader = LiteralReader(text)
    value = reader.value()
    reader.skip()
    if reader.at < len(text):
        raise NoLiteral
    return checked(value)


def json_text(value: Any) -> str:
    """A value of `json_value` or `python_value` as JSON."""
    return json.dumps(value, ensure_ascii=False)


def checked(value: Any) -> Any:
    """The value, with U+FFFD for lone surrogates, which cannot be sent. Raises `NoLiteral` where it is nested too
    deeply, or holds a number that JSON has not."""
    return _checked(value, 0)


def _checked(value: Any, depth: int) -> Any:
    if depth > DEEPEST:
        raise NoLiteral
    match value:
        case str():
            return LONE.sub("\ufffd", value)
        case float() if not math.isfinite(value):
            raise NoLiteral
        case int() if value.bit_length() > MOST_BITS:
            raise NoLiteral
        case list():
            return [_checked(item, depth + 1) for item in value]
        case dict():
            return {LONE.sub("\ufffd", key): _checked(item, depth + 1) for key, item in value.items()}
        case _:
            return value


def _refused(constant: str) -> Any:
    raise NoLiteral


class LiteralReader:
    """Reads Python literals of a text, one after the other. ``at``: the position of the next character."""

    def __init__(self, text: str):
        self.text = text
        self.at = 0

    def skip(self) -> str:
        """Skip white space and comments; returns the next character, or "" at the end."""
        found = BLANK.match(self.text, self.at)
        assert found is not None  # it matches nothing too
        self.at = found.end()
        return self.text[self.at : self.at + 1]

    def take(self, char: str) -> bool:
        """Skip white space, and ``char`` if it is next; returns whether it was."""
        taken = self.skip() == char
        self.at += taken
        return taken

    def value(self, depth: int = 0) -> Any:
        """The next value. Raises `NoLiteral` where there is none."""
        char = self.skip()
        if depth > DEEPEST or not char:
            raise NoLiteral
        if char in "[(":
            return self._items(depth + 1, "]" if char == "[" else ")")
        if char == "{":
            return self._entries(depth + 1)
        if STRING.match(self.text, self.at):
            return self._strings()
        if char in "+-" or char.isdigit() or char == ".":
            return self._number()
        if (name := NAME.match(self.text, self.at)) and name[0] in WORDS:
            self.at = name.end()
            return WORDS[name[0]]
        raise NoLiteral

    def _items(self, depth: int, end: str) -> Any:
        """A list, or a tuple as a list, or a value in parentheses."""
        self.at += 1
        items: list[Any] = []
        comma = True
        while not self.take(end):
            if not comma:
                raise NoLiteral
            items.append(self.value(depth))
            comma = self.take(",")
        if end == ")" and not comma:  # (1) is 1; (1,) and () are tuples
            return items[0] if len(items) == 1 else items
        return items

    def _entries(self, depth: int) -> dict[str, Any]:
        self.at += 1
        entries: dict[str, Any] = {}
        comma = True
        while not self.take("}"):
            if not comma:
                raise NoLiteral
            key = self.value(depth)
            if not self.take(":") or isinstance(key, list | dict):
                raise NoLiteral
            entries[key if isinstance(key, str) else json.dumps(checked(key))] = self.value(depth)
            comma = self.take(",")
        return entries

    def _strings(self) -> str:
        """A string, or neighboring strings, which Python joins."""
        parts = []
        while found := STRING.match(self.text, self.at):
            end = ENDS[found[2]].match(self.text, found.end())
            if end is None:
                raise NoLiteral
            body = self.text[found.end() : end.end() - len(found[2])]
            parts.append(body if found[1] in tuple("rR") else ESCAPE.sub(_character, body))
            self.at = end.end()
            self.skip()
        # Two escapes of JSON for one character beyond U+FFFF are two lone surrogates in Python.
        return "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _number(self) -> int | float:
        sign = 1
        while (char := self.skip()) in ("+", "-"):
            sign = -sign if char == "-" else sign
            self.at += 1
        found = BASED.match(self.text, self.at) or DECIMAL.match(self.text, self.at)
        if found is None or NAME.match(self.text, found.end()) or self.text[found.end() : found.end() + 1].isdigit():
            raise NoLiteral
        self.at = found.end()
        digits = found[0].replace("_", "")
        try:
            if found.re is BASED:
                return sign * int(digits, 0)
            if digits.isdigit():
                if digits[0] == "0" and digits.strip("0"):
                    raise NoLiteral
                return sign * int(digits)
            return sign * float(digits)
        except ValueError:  # more digits than Python reads
            raise NoLiteral from None


def _character(found: re.Match[str]) -> str:
    line, simple, octal, byte, four, eight, name, broken = found.groups()
    if line:
        return ""
    if simple:
        return SIMPLE[simple]
    if broken:
        raise NoLiteral
    try:
        return (
            unicodedata.lookup(name)
            if name is not None
            else chr(int(octal or byte or four or eight, 8 if octal else 16))
        )
    except (KeyError, ValueError, OverflowError):
        raise NoLiteral from None
