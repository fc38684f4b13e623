"""Calls as MiniCPM3 writes them: a block of Python calls, with JSON's words allowed::

    <|tool_call_start|>
    ```python
    get_weather(city="Tokyo",days=2)
    now()
    ```
    <|tool_call_end|>

A block that holds anything else is text. Nothing of it is executed.
"""

import re
from collections.abc import Mapping
from typing import Any

from minicpm_data.conversation.literals import LiteralReader, NoLiteral, checked
from minicpm_data.conversation.reading import Block, Ended, Put, Reader, Unfinished

OPENING, CLOSING = "<|tool_call_start|>", "<|tool_call_end|>"
FENCE = re.compile(r"```(?:python|py)?(?=\s)")
KEYWORD = re.compile(r"([^\W\d][\w.-]*)\s*=(?!=)")
NAME = re.compile(r"[\w.:/-]+")

Call = tuple[str, dict[str, Any]]


class PythonCalls:
    opening = OPENING

    def __init__(self, tools: Mapping[str, Any], text: Put):
        """
        Arguments:
            tools: name -> JSON schema of the parameters.
            text: called with what proves to be no block of calls.
        """
        self._tools, self._text = tools, text

    def read(self) -> Reader[tuple[list[Call], str]]:
        """Read a block, after its opening. Returns its calls, and nothing: nothing is read beyond it.

        Raises:
            Ended: in the block; `Unfinished` where it was not closed.
        """
        block = Block(self._text, OPENING)
        try:
            code = yield from _code(block.put)
        except Ended:
            if CLOSING not in block.held:
                raise Unfinished from None
            block.refuse()  # it was closed in a string that never ends
            raise
        try:
            return calls_of(code, self._tools), ""
        except NoLiteral:
            block.refuse()
            return [], ""


def _code(put: Put) -> Reader[str]:
    """The text up to the closing mark; a mark in a string or a comment does not close."""
    code: list[str] = []
    inside = ""  # the quotes that end the present string, or the end of the line that ends a comment
    begun, escaped = 0, False
    while True:
        char = yield
        if not char:
            raise Ended
        put(char)
        code.append(char)
        at = len(code) - 1
        if escaped:
            escaped = False
        elif not inside:
            if char in "\"'":
                triple = at >= 2 and begun == at - 2 and code[at - 1] == code[at - 2] == char
                inside, begun = char * (3 if triple else 1), at
            elif char == "#":
                inside = "\n"
            elif char == ">" and "".join(code[-len(CLOSING) :]) == CLOSING:
                return "".join(code[: -len(CLOSING)])
        elif char == "\\" and inside != "\n":
            escaped = True
        elif char == inside[0] and at - begun >= len(inside) and "".join(code[-len(inside) :]) == inside:
            inside = ""
        elif char == "\n" and len(inside) == 1:  # a string of one line, without its end
            inside = ""
            if CLOSING in "".join(code[begun:]):
                return "".join(code)  # which is no code


def calls_of(code: str, tools: Mapping[str, Any]) -> list[Call]:
    """The calls of a block. Raises `NoLiteral` where it holds anything else, an unknown tool, or nothing."""
    code = code.strip()
    if fence := FENCE.match(code):
        code = code[fence.end() :].removesuffix("```")
    reader = LiteralReader(code)
    calls: list[Call] = []
    end = 0  # of the last call
    while reader.skip():
        if reader.take(";") and calls:
            continue
        if calls and not {"\n", ";"} & {*code[end : reader.at]}:
            raise NoLiteral
        calls.append(_call(reader, tools))
        end = reader.at
    if not calls:
        raise NoLiteral
    return calls


def _call(reader: LiteralReader, tools: Mapping[str, Any]) -> Call:
    found = NAME.match(reader.text, reader.at)
    if found is None or found[0] not in tools:
        raise NoLiteral
    reader.at = found.end()
    if not reader.take("("):
        raise NoLiteral
    schema = tools[found[0]]
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    positions = iter(properties if isinstance(properties, Mapping) else ())
    arguments: dict[str, Any] = {}
    comma, named = True, False
    while not reader.take(")"):
        if not comma:
            raise NoLiteral
        keyword = KEYWORD.match(reader.text, reader.at)
        if keyword:
            named, name = True, keyword[1]
            reader.at = keyword.end()
        else:
            name = None if named else next(positions, None)
        if name is None or name in arguments:
            raise NoLiteral
        arguments[name] = checked(reader.value())
        comma = reader.take(",")
    return found[0], arguments
