"""The lines of a prompts file: plain text, JSON objects, or requests of OpenAI's batch format."""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from minicpm_data.datasets.jsonl import BOM, LONGEST_LINE, scan_lines
from minicpm_serve.http.image_access import ImageAccess
from minicpm_serve.http.schemas import Body, ChatBody, CompletionBody, sentence
from weights_io.errors import InputError, listed, not_utf8, short

JSON_LINES = (".jsonl", ".ndjson", ".json")
CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
OPENAI_KEYS = {"custom_id", "method", "url", "body"}
FORMS = 'give "prompt", "messages", or "custom_id", "method", "url" and "body" as OpenAI does'


@dataclass(frozen=True)
class Line:
    """A line of a prompts file.

    Attributes:
        number: of the line, from 1 on.
        body: what is asked.
        custom_id: of OpenAI's batch format; None in the other formats.
    """

    number: int
    body: ChatBody | CompletionBody
    custom_id: str | None = None


@dataclass(frozen=True)
class Reader:
    """Reads lines lazily, and says what they ask where they do not say it themselves.

    Attributes:
        name: the model's name in requests.
        usual: fields of a request that a line need not have.
        chat_only: the same, for chats.
        seed: of line 0; each line has the next one. None: a random one.
        system_prompt: before the messages of a line that has no system message.
        raw: "prompt" is continued without the chat template.
        images: which images a line may name; None: the model takes none.
    """

    name: str
    usual: dict[str, Any] = field(default_factory=dict)
    chat_only: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    system_prompt: str | None = None
    raw: bool = False
    images: ImageAccess | None = None

    def lines(self, path: Path) -> Iterator[Line]:
        """The lines of a file. Raises `InputError` at a wrong one."""
        for number, document in _documents(path):
            try:
                if isinstance(document, InputError):
                    raise document
                yield self._line(number, document)
            except InputError as error:
                place = "" if error is document else f"line {number}: "
                raise InputError(f"{path}, {place}{error}") from None

    def _line(self, number: int, document: dict[str, Any]) -> Line:
        if OPENAI_KEYS & document.keys():
            custom_id, url, body = _openai(document)
            kind: type[Body] = ChatBody if url == CHAT_URL else CompletionBody
            return Line(number, self._checked(kind, body, number), custom_id)
        if {"prompt", "messages"} <= document.keys() or not {"prompt", "messages"} & document.keys():
            raise InputError(f"it has {listed(document) if document else 'no keys'}; {FORMS}.")
        if "prompt" in document and not isinstance(document["prompt"], str):
            raise InputError(f"prompt is {short(repr(document['prompt']))}; it must be a text.")
        if "prompt" in document and not self.raw:
            message = {"role": "user", "content": document["prompt"]}
            document = {"messages": [message], **{k: v for k, v in document.items() if k != "prompt"}}
        kind = ChatBody if "messages" in document else CompletionBody
        return Line(number, self._checked(kind, document, number))

    def _checked(self, kind: type[Body], given: dict[str, Any], number: int) -> Any:
        """The request of a line, with all that it does not say. Raises `InputError`."""
        usual = {**self.usual, **(self.chat_only if kind is ChatBody else {})}
        if self.seed is not None:
            usual["seed"] = (self.seed + number) % 2**63
        if given.get("max_completion_tokens") is not None:
            usual.pop("max_tokens", None)
        given = {**usual, **{key: value for key, value in given.items() if value is not None}}
        messages = given.get("messages")
        if self.system_prompt is not None and kind is ChatBody and isinstance(messages, list):
            if not any(isinstance(message, dict) and message.get("role") == "system" for message in messages):
                given["messages"] = [{"role": "system", "content": self.system_prompt}, *messages]
        body = validated(kind, given, self.images)
        if body.model not in (None, self.name):
            raise InputError(
                f"model is {short(body.model)!r}, and {short(self.name)!r} runs; give {{served_model_name}} "
                f"{short(body.model)}, or correct it.",
                others=["served_model_name"],
            )
        if body.stream:
            raise InputError("stream is true; a file is not streamed, so leave it out.")
        return body


def validated(kind: type[Body], given: dict[str, Any], images: ImageAccess | None = None) -> Any:
    """A request of this kind, checked as far as it can be without the model. Raises `InputError`."""
    try:
        body = kind.model_validate(given)
        body.check()
        if isinstance(body, ChatBody):
            body.plain(images)
            body.tool_use()
    except ValidationError as error:
        raise InputError(sentence([{**e, "loc": ("body", *e["loc"])} for e in error.errors()])[0]) from None
    except RequestValidationError as error:
        raise InputError(sentence(error.errors())[0]) from None
    return body


def survey(reader: Reader, path: Path) -> tuple[int, int]:
    """Check every line of a file, holding 16 bytes of each.

    Returns:
        The number of lines that ask something, and the number of the last one.

    Raises:
        InputError: a line is wrong, two have the same custom_id, or there is none.
    """
    import numpy as np

    numbers, digests = array("Q"), array("Q")
    count = last = 0
    for line in reader.lines(path):
        count, last = count + 1, line.number
        if line.custom_id is not None:
            numbers.append(line.number)
            digest = hashlib.blake2b(line.custom_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            digests.append(int.from_bytes(digest))
    if not count:
        raise InputError(f"{path} is empty; give it one prompt a line.")
    if digests:
        order = np.argsort(np.asarray(digests), kind="stable")
        same = np.flatnonzero(np.diff(np.asarray(digests)[order]) == 0)
        if len(same):
            first, second = sorted(int(numbers[order[i]]) for i in (same[0], same[0] + 1))
            raise InputError(f"{path}, line {second}: custom_id is also that of line {first}; give each its own.")
    return count, last


def _documents(path: Path) -> Iterator[tuple[int, Any]]:
    """The objects of a file, line by line; of plain text, each line is a prompt."""
    if path.suffix.lower() in JSON_LINES:
        yield from scan_lines(path)
        return
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                yield number, InputError(f"line {number} is longer than {LONGEST_LINE} bytes; split it.")
                return
            try:
                text = (line.removeprefix(BOM) if number == 1 else line).decode("utf-8")
            except UnicodeDecodeError as error:
                yield number, not_utf8(f"line {number}", error, "convert the file to UTF-8 first")
                return
            yield number, {"prompt": text.strip()}


def _openai(document: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """custom_id, url and body of a request in OpenAI's batch format. Raises `InputError`."""
    if unknown := document.keys() - OPENAI_KEYS:
        raise InputError(f"{short(min(unknown))} is no key of OpenAI's batch format; {FORMS}.")
    custom_id, url, body = document.get("custom_id"), document.get("url"), document.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise InputError(f"custom_id is {short(repr(custom_id))}; it must be a text.")
    if document.get("method") != "POST":
        raise InputError(f'method is {short(repr(document.get("method")))}; it must be "POST".')
    if url not in (CHAT_URL, TEXT_URL):
        raise InputError(f"url is {short(repr(url))}; it must be {CHAT_URL} or {TEXT_URL}.")
    if not isinstance(body, dict):
        raise InputError(f"body is {short(repr(body))}; it must be the object of a request.")
    return custom_id, url, body
