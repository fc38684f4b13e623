"""What an answer may be, where the request says it: JSON of a schema, any JSON object, a regular expression, or one of
several texts.

OpenAI's ``response_format`` takes json_object and json_schema. vLLM's ``structured_outputs`` and ``guided_*`` take a
schema, a regular expression, or choices. The answer is held token by token (`minicpm_data.generation.constraint`),
after the thought where the prompt opens one, so JSON always parses unless the answer is cut at ``max_tokens``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from minicpm_data.conversation.answers import THINK_END
from weights_io.errors import InputError, short

TYPES = '"text", "json_object" or "json_schema"'
KINDS = ("json", "regex", "choice")  # of ``structured_outputs``; with guided_ before them, fields of their own
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
LONGEST = 100_000  # characters of a schema or a regular expression
MOST_CHOICES = 1000


class Formatted(BaseModel):
    """The fields of a body that say what the answer may be."""

    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None

    @property
    def format(self) -> "Format | None":
        """The format of the answer; None for any text. Raises `InputError`."""
        guided = {kind: getattr(self, f"guided_{kind}") for kind in KINDS}
        return format_of(self.response_format, self.structured_outputs, guided)


@dataclass(frozen=True)
class Format:
    """A format of answers.

    Attributes:
        rule: what the text must be, in the Lark form of `llguidance`.
        option: the field of the request, for errors.
    """

    rule: str
    option: str

    def grammar(self, in_thought: bool) -> str:
        """The grammar of an answer. ``in_thought``: the prompt ends in an open thought."""
        if not in_thought:
            return f"start: held\n{self.rule}"
        ending = "".join(f"\\{letter}" if letter in r"\/[](){}.*+?^$|" else letter for letter in THINK_END)
        return f'start: inside "\\n\\n" held\ninside[lazy]: /(?s:.*){ending}/\n{self.rule}'


def format_of(response_format: Any, structured: Any, guided: Mapping[str, Any]) -> Format | None:
    """The format that a request asks for; None for any text.

    Arguments:
        response_format: OpenAI's field.
        structured: vLLM's ``structured_outputs``.
        guided: vLLM's older fields, by the kind: json, regex, choice.

    Raises:
        InputError: a format is not supported, or there are several.
    """
    asked = [_of_openai(response_format)]
    if structured is not None:
        if not isinstance(structured, Mapping) or [*structured] not in [[kind] for kind in KINDS]:
            raise InputError(f"must hold one of {', '.join(KINDS)}.", option="structured_outputs")
        ((kind, value),) = structured.items()
        asked.append(_of_kind(kind, value, "structured_outputs"))
    asked += [_of_kind(kind, value, f"guided_{kind}") for kind, value in guided.items() if value is not None]
    found = [each for each in asked if each is not None]
    if len(found) > 1:
        first, second, *_ = (each.option for each in found)
        raise InputError(f"and {{{second}}} both say what the answer is; give one.", first, [second])
    return found[0] if found else None


def _of_openai(given: Any) -> Format | None:
    option = "response_format"
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else None
    match kind:
        case "text":
            _check_keys(given, ("type",), option)
            return None
        case "json_object":  # llama.cpp's may have a schema
            _check_keys(given, ("type", "schema"), option)
            schema = given.get("schema")
            return _json({"type": "object"} if schema is None else schema, option)
        case "json_schema":
            _check_keys(given, ("type", "json_schema"), option)
            inner = given.get("json_schema")
            if not isinstance(inner, Mapping):
                raise InputError('needs "json_schema": {"name": "...", "schema": {...}}.', option=option)
            _check_keys(inner, ("name", "schema", "strict", "description"), option)
            return _json(inner.get("schema", {}), option)
    raise InputError(f"has the type {short(json.dumps(kind))}; it must be {TYPES}.", option=option)


def _of_kind(kind: str, value: Any, option: str) -> Format:
    if kind == "json":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise InputError("holds a schema that is no JSON; correct it.", option=option) from None
        return _json(value, option)
    if kind == "regex":
        if not isinstance(value, str) or not value:
            raise InputError("must be a regular expression, as a text.", option=option)
        _check_length(value, option)
        return Format(f"held: /(?s:{_slashed(value)})/", option)
    texts = value if isinstance(value, list) else []
    if not 1 <= len(texts) <= MOST_CHOICES or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"must be a list of 1 to {MOST_CHOICES} texts.", option=option)
    _check_length("".join(texts), option)
    return Format("held: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts), option)


def _json(schema: Any, option: str) -> Format:
    """JSON of a schema, written as `json.dumps` writes it."""
    if not isinstance(schema, Mapping):
        raise InputError("has a schema that is no object; give a JSON schema.", option=option)
    try:
        text = json.dumps({**schema, "x-guidance": COMPACT})
    except RecursionError:
        raise InputError("has a schema that is nested too deeply; give a flatter one.", option=option) from None
    _check_length(text, option)
    return Format(f"held: %json {text}", option)


def _slashed(pattern: str) -> str:
    """A regular expression between slashes: those inside are escaped."""
    found, escaped = "", False
    for letter in pattern:
        found += "\\/" if letter == "/" and not escaped else letter
        escaped = letter == "\\" and not escaped
    return found.replace("\n", "\\n")


def _check_length(text: str, option: str) -> None:
    if len(text) > LONGEST:
        raise InputError(f"has {len(text):,} characters; give at most {LONGEST:,}.", option=option)


def _check_keys(given: Mapping[str, Any], known: tuple[str, ...], option: str) -> None:
    if unknown := sorted(str(key) for key in given if key not in known):
        raise InputError(f"has the key {short(unknown[0])!r}; it may have {', '.join(known)}.", option=option)
