"""Calls as MiniCPM5 writes them::

    <function name="write_file"><param name="path">a.txt</param><param name="text"><![CDATA[1 < 2]]></param></function>

The tags are also read with single quotes, with further attributes, and without the space after their name, which some
tokenizers lose. What names no known tool, or is not whole, is text.
"""

import re
from collections.abc import Mapping
from typing import Any

from minicpm_data.conversation.reading import Block, Ended, Put, Reader, Unfinished, one, until
from minicpm_data.conversation.schema_values import value_of

OPENING = "<function"
CLOSING = "</function"
PARAMETER, PARAMETER_END = "<param", "</param"
CDATA, CDATA_END = "<![CDATA[", "]]>"
TAGS = (OPENING, CLOSING, PARAMETER, PARAMETER_END, CLOSING + ">", PARAMETER_END + ">")

NAMED = re.compile(r"""name\s*=\s*(["'])(.*?)(\1|$)""", re.DOTALL)
REFERENCE = re.compile(r"&(?:(lt|gt|amp|quot|apos)|#([0-9]{1,7})|#x([0-9a-fA-F]{1,6}));")
ENTITIES = {"lt": "<", "gt": ">", "amp": "&", "quot": '"', "apos": "'"}

Call = tuple[str, dict[str, Any]]


class XmlCalls:
    opening = OPENING

    def __init__(self, tools: Mapping[str, Any], text: Put):
        """
        Arguments:
            tools: name -> JSON schema of the parameters.
            text: called with what proves to be no call.
        """
        self._tools, self._text = tools, text

    def read(self) -> Reader[tuple[list[Call], str]]:
        """Read a block, after its opening. Returns its call, or none, and what was read beyond it: a character, another
        opening, or nothing.

        Raises:
            Ended: in the block; `Unfinished` where it may still have become a call.
        """
        block = Block(self._text, OPENING)
        try:
            found, beyond = yield from _attributes(block)
            if found is None or found.get("name") not in self._tools:
                block.refuse()
                return [], beyond
            arguments, beyond = yield from self._arguments(block, self._tools[found["name"]])
        except Ended:
            if self._may_be_known(block.held):
                raise Unfinished from None
            block.refuse()
            raise
        return ([] if block.refused else [(found["name"], arguments)]), beyond

    def _may_be_known(self, tag: str) -> bool:
        """Whether what is held back of an unfinished block may become a call of a known tool."""
        if not tag:
            return False
        if (named := NAMED.search(tag)) is None:
            return True
        return named[2] in self._tools if named[3] else any(name.startswith(named[2]) for name in self._tools)

    def _arguments(self, block: Block, schema: Any) -> Reader[tuple[dict[str, Any], str]]:
        """The parameters up to the closing tag; and what was read beyond it."""
        arguments: dict[str, Any] = {}

        def between(text: str) -> None:
            block.put(text)
            if not text.isspace() and text:
                block.refuse()

        beyond = ""
        while True:
            marker = yield from until((PARAMETER, CLOSING, OPENING), between, beyond, block.put)
            if marker == OPENING:
                block.refuse()
                return {}, OPENING
            block.put(marker)
            if marker == CLOSING:
                missed, beyond = yield from _rest_of_tag("", block.put)
                if missed is None:
                    return arguments, ""
                block.refuse()
                continue
            found, beyond = yield from _attributes(block)
            if found is None:
                block.refuse()
                continue
            name = found.get("name")
            if name is None or name in arguments:
                block.refuse()
            value = yield from _value(block)
            if value is None:  # the block ended in it
                block.refuse()
                return {}, ""
            if not block.refused:
                assert name is not None
                arguments[name] = value_of(value, _property(schema, name), schema)


def _property(schema: Any, name: str) -> Any:
    """The schema of a parameter; None where there is none."""
    if not isinstance(schema, Mapping):
        return None
    properties, others = schema.get("properties"), schema.get("additionalProperties")
    return properties.get(name, others) if isinstance(properties, Mapping) else others


def _attributes(block: Block) -> Reader[tuple[dict[str, str] | None, str]]:
    """The attributes of a tag, up to its ``>``. None where it is no tag, with the character that shows it."""
    found: dict[str, str] = {}
    char = yield from _visible(block.put)
    while char != ">":
        key = []
        while char.isalnum() or char in "_-:.":
            block.put(char)
            key.append(char)
            char = yield from one()
        if char.isspace():
            block.put(char)
            char = yield from _visible(block.put)
        if not key or char != "=":
            return None, char
        block.put(char)
        quote = yield from _visible(block.put)
        if quote not in "\"'":
            return None, quote
        block.put(quote)
        value = []
        while (char := (yield from one())) != quote:
            if char in "<\n":
                return None, char
            block.put(char)
            value.append(char)
        block.put(quote)
        if found.setdefault("".join(key), text := "".join(value)) != text:
            return None, ""
        char = yield from _visible(block.put)
    block.put(char)
    return found, ""


def _visible(put: Put) -> Reader[str]:
    """The next character that is no white space, which goes to ``put``."""
    while (char := (yield from one())).isspace():
        put(char)
    return char


def _rest_of_tag(name: str, put: Put) -> Reader[tuple[str | None, str]]:
    """Read white space, ``name``, white space and ``>``. Returns None; or what was read before another character, and
    that character."""
    read: list[str] = []
    at = 0
    while True:
        char = yield from one()
        if char.isspace() and at in (0, len(name)):
            pass
        elif at < len(name) and char == name[at]:
            at += 1
        elif at == len(name) and char == ">":
            put(char)
            return None, ""
        else:
            return "".join(read), char
        put(char)
        read.append(char)


def _value(block: Block) -> Reader[list[str] | None]:
    """The text of a parameter up to its closing tag, its references resolved; then as it was written. None where the
    block ends first."""
    plain: list[str] = []

    def put(text: str) -> None:
        block.put(text)
        plain.append(text)

    beyond = ""
    while True:
        marker = yield from until((PARAMETER_END, CLOSING, CDATA), put, beyond)
        block.put(marker)
        if marker == CDATA:
            before = "".join(plain)
            inside = yield from _cdata(block)
            return [inside if before.isspace() else resolved(before) + inside]
        missed, beyond = yield from _rest_of_tag("", block.put)
        if missed is None:
            text = "".join(plain)
            return [resolved(text), text] if marker == PARAMETER_END else None
        plain += [marker, missed]


def _cdata(block: Block) -> Reader[str]:
    """The text of a CDATA section: it ends at the ``]]>`` that the parameter's closing tag follows."""
    inside: list[str] = []

    def put(text: str) -> None:
        block.put(text)
        inside.append(text)

    beyond = ""
    while True:
        marker = yield from until((CDATA_END,), put, beyond)
        block.put(marker)
        missed, beyond = yield from _rest_of_tag(PARAMETER_END, block.put)
        if missed is None:
            return "".join(inside)
        inside += [marker, missed]


def resolved(text: str) -> str:
    """``text`` with XML's five entities and its references to characters resolved. Others stay."""

    def character(found: re.Match[str]) -> str:
        name, decimal, hexadecimal = found.groups()
        if name:
            return ENTITIES[name]
        code = int(decimal) if decimal else int(hexadecimal, 16)
        allowed = code in (9, 10, 13) or 0x20 <= code < 0xD800 or 0xE000 <= code < 0xFFFE or 0x10000 <= code < 0x110000
        return chr(code) if allowed else found[0]

    return REFERENCE.sub(character, text)
