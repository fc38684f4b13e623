"""What a model's answer says: its thought, the visible text and the calls of tools, while it is still being written.

    parser = AnswerParser(tools, "xml", in_thought=True)
    for response in stream_generate(...):
        for piece in parser.feed(response.text): ...
    for piece in parser.finish(): ...

Thoughts and calls are found in the text, because the tokenizers of MiniCPM3 and MiniCPM4.1 have no tokens for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minicpm_data.conversation import python_calls, xml_calls
from minicpm_data.conversation.literals import json_text
from minicpm_data.conversation.python_calls import PythonCalls
from minicpm_data.conversation.reading import Ended, Reader, Unfinished, until
from minicpm_data.conversation.xml_calls import XmlCalls

CallForm = Literal["xml", "python"]

THINK, THINK_END = "<think>", "</think>"
THOUGHT, THOUGHT_END = "<|thought_start|>", "<|thought_end|>"
NEWLINES = "\r\n"
# What thoughts and calls are made of. Where a tokenizer has special tokens of these texts, they are text in an answer.
TAGS = frozenset([THINK, THINK_END, THOUGHT, THOUGHT_END, *xml_calls.TAGS, python_calls.OPENING, python_calls.CLOSING])


@dataclass(frozen=True)
class Reasoning:
    """A part of the thought."""

    text: str


@dataclass(frozen=True)
class Content:
    """A part of the visible answer."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A whole call. ``arguments``: a JSON object as text."""

    name: str
    arguments: str


Piece = Reasoning | Content | ToolCall


class AnswerParser:
    """Parses an answer piece by piece. The joined pieces do not depend on how the text is cut.

    A call comes out when it is whole, so half a call never does. Text that may be the beginning of a tag, and white
    space that may stand next to a call, is held back until the next characters decide. Time and memory grow linearly
    with the text.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] = (),
        call_form: CallForm | None = None,
        in_thought: bool = False,
        parallel: bool = True,
    ):
        """
        Arguments:
            tools: those of the request, in OpenAI's form. Calls of others are text.
            call_form: how the model writes calls: ``xml`` (MiniCPM5) or ``python`` (MiniCPM3). None: it does not.
            in_thought: whether the prompt ended in an open thought.
            parallel: False ends the answer after its first call: `done`.
        """
        known = {name: schema for name, schema in map(_named, tools) if name is not None}
        forms: dict[str, type[XmlCalls] | type[PythonCalls]] = {"xml": XmlCalls, "python": PythonCalls}
        self._calls = forms[call_form](known, self._content) if call_form and known else None
        self._thoughts = {THINK: THINK_END, **({THOUGHT: THOUGHT_END} if call_form == "python" else {})}
        self._parallel = parallel
        self.done = False  # nothing more of the answer is of use
        self._pieces: list[Piece] = []
        self._kind: type[Reasoning] | type[Content] = Content
        self._text: list[str] = []  # of the last piece, which is not whole yet
        self._space: list[str] = []  # white space that is held back
        self._begun = False  # whether the present thought, or the answer, has visible text
        self._called = False  # whether there was a call, also an unfinished one
        self._after_thought = in_thought
        self._reader = self._read(in_thought)
        next(self._reader)

    def feed(self, text: str) -> list[Piece]:
        """Read the next characters of the answer, and return what they complete."""
        for char in text:
            if self.done:
                break
            self._reader.send(char)
        return self._taken()

    def finish(self) -> list[Piece]:
        """The rest, at the end of the answer. An unfinished call is lost."""
        if not self.done:
            self.done = True
            try:
                self._reader.send("")
            except StopIteration:
                pass
        return self._taken()

    def _read(self, in_thought: bool) -> Reader[None]:
        try:
            if in_thought:
                yield from self._thought(tuple(self._thoughts.values()))
            yield from self._answer()
        except Ended:
            if not self._called and (self._begun or not self._after_thought):
                self._flush()

    def _thought(self, ends: tuple[str, ...]) -> Reader[None]:
        self._begun, self._space = False, []
        try:
            yield from until(ends, self._reasoning)
        finally:
            self._begun, self._space, self._after_thought = False, [], True

    def _answer(self) -> Reader[None]:
        opening = (self._calls.opening,) if self._calls else ()
        markers = opening if self._after_thought else (*self._thoughts, *opening)
        beyond = ""
        while True:
            if beyond in opening:
                marker, beyond = beyond, ""
            else:
                marker = yield from until(markers, self._content, beyond, self._rest)
                beyond = ""
            if marker in opening:
                beyond = yield from self._block()
            elif self._begun or self._called or self._after_thought:
                self._content(marker)
            else:
                yield from self._thought((self._thoughts[marker],))
                markers = opening

    def _block(self) -> Reader[str]:
        """Read a block of calls. Returns what was read beyond it."""
        assert self._calls is not None
        try:
            calls, beyond = yield from self._calls.read()
        except Unfinished:
            self._called = True
            raise
        for name, arguments in calls if self._parallel else calls[:1]:
            self._take()
            if not self._begun:
                self._space = []
            self._called = True
            self._pieces.append(ToolCall(name, json_text(arguments)))
            self.done = not self._parallel
        return beyond

    def _reasoning(self, text: str) -> None:
        """Put text into the thought, without the newlines at its ends."""
        self._kind = Reasoning
        self._put(text, NEWLINES)

    def _content(self, text: str) -> None:
        """Put text into the answer, without the newlines after a thought and the white space next to calls."""
        if self._kind is not Content:
            self._take()
            self._kind = Content
        self._put(text, None if self._called else NEWLINES if self._after_thought else "")

    def _rest(self, text: str) -> None:
        """Put the beginning of a tag at the end of the answer; after a call, it belongs to another one."""
        if not self._called:
            self._content(text)

    def _put(self, text: str, dropped: str | None) -> None:
        """Append text; ``dropped`` are the characters that go from its beginning, None for all white space."""
        for char in text:
            if char.isspace() and (not self._begun or self._calls or self._kind is Reasoning):
                self._space.append(char)
                continue
            if not self._begun:
                self._space = list("".join(self._space).lstrip(dropped)) if dropped != "" else self._space
                self._begun = True
            self._flush()
            self._text.append(char)

    def _flush(self) -> None:
        self._text += self._space
        self._space = []

    def _take(self) -> None:
        """Complete the piece that is being collected."""
        if self._text:
            self._pieces.append(self._kind("".join(self._text)))
            self._text = []

    def _taken(self) -> list[Piece]:
        self._take()
        taken, self._pieces = self._pieces, []
        return taken


def _named(tool: Mapping[str, Any]) -> tuple[str | None, Any]:
    """The name of a tool and the schema of its parameters."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str):
        return None, None
    return name, function.get("parameters")
