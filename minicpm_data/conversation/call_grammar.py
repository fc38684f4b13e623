"""The grammar of an answer that has to call a tool, from the schemas of the tools, in both forms of calls.

Parameters come in the order of the schema. In the XML form a text is written as it is, or in CDATA. All other values
are JSON, whose strings have neither ``<`` nor ``&`` in the XML form. So a call is always parsed as it was meant.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minicpm_data.conversation import python_calls, xml_calls
from minicpm_data.conversation.answers import THINK_END, THOUGHT_END, CallForm
from minicpm_data.conversation.schema_values import resolved_reference
from weights_io.errors import InputError, listed, short

NOTES = {"title", "description", "default", "examples", "$schema", "$comment", "deprecated", "readOnly", "writeOnly"}
OF_ROOT = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "strict", *NOTES}
OF_TEXT = {"type", "enum", "const", "minLength", "maxLength", "pattern", "format", *NOTES}
MOST_BRANCHES = 200  # alternatives of one parameter
SAFE = "^[^<&]*$"  # strings that XML needs not escape
ANY = "any_value"  # among the definitions of a schema
WHOLE = "-?(0|[1-9][0-9]{0,15})"  # of more digits, every second number is none of float64
_BOUNDS = {"minimum": 1 - 2**53}, {"maximum": 2**53 - 1}
NUMBERS = {"integer": f"/{WHOLE}/", "number": rf"/{WHOLE}(\.[0-9]{{1,16}})?([eE][+-]?[0-9]{{1,2}})?/"}


def call_grammar(tools: Sequence[Mapping[str, Any]], form: CallForm, in_thought: bool, parallel: bool) -> str:
    """The grammar of one call or several, for `minicpm_data.generation.constraint`.

    Arguments:
        tools: those that may be called, in OpenAI's form.
        form: how the model writes calls.
        in_thought: the prompt ends in an open thought, which the model ends before it calls.
        parallel: several calls may follow each other.

    Returns:
        A grammar in the Lark form of `llguidance`.

    Raises:
        InputError: a schema cannot be written as a grammar.
    """
    rules = _Rules(form)
    try:
        calls = " | ".join(rules.call(tool.get("function", tool)) for tool in tools)
    except RecursionError:
        raise InputError(
            "cannot be held: the schema of a tool is nested too deeply; give a flatter one.", "tool_choice"
        ) from None
    begun, end, closed = "", "", "\n\n"
    if form == "python":
        begun, end, closed = python_calls.OPENING + "\n```python\n", "\n```\n" + python_calls.CLOSING, "\n"
    thought = "thought " if in_thought else ""
    more = '("\\n" call)*' if parallel else ""
    lines = [f"start: {thought}{_quoted(begun)} call {more} {_quoted(end)}", f"call: {calls}"]
    if in_thought:
        ends = f"({_escaped(THINK_END)}|{_escaped(THOUGHT_END)})" if form == "python" else _escaped(THINK_END)
        lines += [f"thought: inside {_quoted(closed)}", f"inside[lazy]: /(?s:.*){ends}/"]
    return "\n".join([*lines, *rules.lines])


class _Rules:
    """The rules of the calls of several tools."""

    def __init__(self, form: CallForm):
        self.form = form
        self.lines: list[str] = []

    def rule(self, body: str, kind: str = "r", option: str = "") -> str:
        """Add a rule, and return its name; ``kind`` of "T" makes it a terminal."""
        name = f"{kind}{len(self.lines)}"
        self.lines.append(f"{name}{option}: {body}")
        return name

    def call(self, function: Mapping[str, Any]) -> str:
        """The rule of the calls of a function."""
        name, schema = function["name"], function.get("parameters") or {}

        def refused(why: str) -> InputError:
            return InputError(f"cannot be held to the tool {short(name)!r}: {why}.", option="tool_choice")

        if unknown := sorted(set(schema) - OF_ROOT):
            raise refused(f"the schema of its parameters has {listed(unknown)}, which no grammar has")
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        if lacking := [key for key in required if key not in properties]:
            raise refused(f"it requires {listed(lacking)}, without a schema")
        writable = [key for key in properties if self._writable(key)]
        if lost := [key for key in required if key not in writable]:
            raise refused(f"its calls cannot name {listed(lost)}")
        shared = {**schema.get("definitions", {}), **schema.get("$defs", {})}
        found = [(self.parameter(key, properties[key], shared), key in required) for key in writable]
        if self.form == "python":
            return self.rule(f'{_quoted(name + "(")} {self._separated(found)} ")"')
        opening = f'{xml_calls.OPENING} name="{name}">'
        body = " ".join(rule if needed else f"{rule}?" for rule, needed in found)
        return self.rule(f"{_quoted(opening)} {body} {_quoted(xml_calls.CLOSING + '>')}")

    def _writable(self, key: str) -> bool:
        """Whether a call can name a parameter."""
        if self.form == "python":
            return python_calls.KEYWORD.fullmatch(f"{key}=") is not None
        return not {*'"<\n'} & {*key}

    def _separated(self, found: Sequence[tuple[str, bool]]) -> str:
        """The rule of parameters with commas between those that are given."""
        rest = alone = '""'  # what may follow a parameter; what may follow none
        for rule, needed in reversed(found):
            after, first = self.rule(f'"," {rule} {rest}'), self.rule(f"{rule} {rest}")
            if needed:
                rest, alone = after, first
            else:
                rest, alone = self.rule(f"{after} | {rest}"), self.rule(f"{first} | {alone}")
        return alone

    def parameter(self, key: str, schema: Any, shared: Mapping[str, Any]) -> str:
        """The rule of a parameter with its value. ``shared``: the definitions that references name."""
        value = " | ".join(dict.fromkeys(self.value(branch, shared) for branch in _branches(schema, shared)))
        if self.form == "python":
            return self.rule(f"{_quoted(key + '=')} ({value})")
        opening = f'{xml_calls.PARAMETER} name="{key}">'
        return self.rule(f"{_quoted(opening)} ({value}) {_quoted(xml_calls.PARAMETER_END + '>')}")

    def value(self, schema: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
        """The rule of a value."""
        keys = set(schema) - NOTES
        if keys == {"type"} and schema["type"] in NUMBERS:
            return self.rule(NUMBERS[schema["type"]], "T")
        if self.form == "xml":
            if not keys:
                return self.text({})
            if keys <= OF_TEXT and ("enum" in keys or "const" in keys):
                members = schema["enum"] if "enum" in keys else [schema["const"]]
                return self.rule(" | ".join(_quoted(_text_of(value)) for value in members))
            if keys <= OF_TEXT and schema.get("type") == "string":
                return self.text(schema)
        return self.json(schema, shared)

    def json(self, schema: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
        """The rule of a JSON value."""
        safe = self.form == "xml"
        whole = {**_held(schema, safe), "x-guidance": {"whitespace_flexible": False}}
        if '"$ref"' in json.dumps(whole):
            every = {"anyOf": [{"type": kind} for kind in ("null", "boolean", "number", "string", "array", "object")]}
            definitions = {name: _held(part, safe) for name, part in {**shared, ANY: every}.items()}
            whole |= {"$defs": definitions, "definitions": definitions}
        return self.rule(f"%json {json.dumps(whole)}")

    def text(self, schema: Mapping[str, Any]) -> str:
        """The rule of a string that is written as it is."""
        limits = []
        least, most = schema.get("minLength"), schema.get("maxLength")
        if least is not None or most is not None:
            limits.append(f"/(?s:.{{{least or 0},{'' if most is None else most}}})/")
        if (pattern := schema.get("pattern")) is not None:
            limits.append(_matching(pattern))
        plain = self.rule(" & ".join(["/[^<&]*/", *limits]), "T")
        if limits:
            return plain
        inside = self.rule(f"/(?s:.*){_escaped(xml_calls.CDATA_END)}/", option="[lazy]")
        return self.rule(f"{plain} | {_quoted(xml_calls.CDATA)} {inside}")


def _branches(schema: Any, shared: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schemas of which a value fits one: those of references, unions and several types.

    Raises `InputError` where they are too many.
    """
    left, seen = [schema], set()
    count = 0
    while left:
        part = left.pop(0)
        part = {} if part is True else part
        if not isinstance(part, Mapping) or (count := count + 1) > MOST_BRANCHES:
            raise InputError("cannot be held: the schema of a parameter is none, or has too many parts.", "tool_choice")
        keys = set(part) - NOTES
        union = next((key for key in ("anyOf", "oneOf") if keys == {key} and isinstance(part[key], list)), None)
        if keys == {"$ref"} and isinstance(part["$ref"], str):
            if part["$ref"] not in seen:
                seen.add(part["$ref"])
                left.insert(0, resolved_reference(part["$ref"], {"$defs": shared, "definitions": shared}))
        elif union:
            left = [*part[union], *left]
        elif isinstance(part.get("type"), list):
            left = [*({**part, "type": kind} for kind in part["type"]), *left]
        else:
            yield _of_its_type(part)


def _of_its_type(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema, with those members of an enum that have its type."""
    kinds: dict[str, Any] = {"string": str, "null": type(None), "boolean": bool, "integer": int, "number": (int, float)}
    wanted = kinds.get(schema.get("type", ""))
    if wanted is None or not isinstance(members := schema.get("enum"), list):
        return schema
    return {
        **schema,
        "enum": [m for m in members if isinstance(m, wanted) and (wanted is bool or not isinstance(m, bool))],
    }


def _held(schema: Any, safe: bool) -> Any:
    """A schema of which every number is finite, and with ``safe`` no string has ``<`` or ``&``."""
    if not isinstance(schema, Mapping) or not set(schema) - NOTES:
        return {"$ref": f"#/$defs/{ANY}"} if schema is not False else False
    found = dict(schema)
    kinds = found.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    for key in ("properties", "patternProperties"):
        if isinstance(parts := found.get(key), Mapping):
            found[key] = {name: _held(part, safe) for name, part in parts.items()}
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(parts := found.get(key), list):
            found[key] = [_held(part, safe) for part in parts]
    if kinds and "object" in kinds and found.get("additionalProperties") is not False:
        others = _held(found.get("additionalProperties", {}), safe)
        if not safe:
            found["additionalProperties"] = others
        elif "patternProperties" not in found:
            found |= {"patternProperties": {SAFE: others}, "additionalProperties": False}
    if kinds and "array" in kinds:
        found["items"] = _held(found.get("items", {}), safe)
    if {"enum", "const", "$ref", "anyOf", "oneOf", "allOf"} & set(found):
        return found
    if kinds and {"number", "integer"} & set(kinds):
        found = {**_BOUNDS[0], **found} if "exclusiveMinimum" not in found else found
        found = {**_BOUNDS[1], **found} if "exclusiveMaximum" not in found else found
    if safe and (kinds is None or "string" in kinds):
        also = {"allOf": [{"type": "string", "pattern": SAFE}]} if "pattern" in found else {"pattern": SAFE}
        found |= also
    return found


def _text_of(value: Any) -> str:
    """A member of an enum as the text of a parameter."""
    text = value if isinstance(value, str) else json.dumps(value)
    if {*"<&\n"} & {*text} and xml_calls.CDATA_END not in text:
        return f"{xml_calls.CDATA}{text}{xml_calls.CDATA_END}"
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _matching(pattern: str) -> str:
    """The regular expression of the whole strings in which a pattern of JSON schema is found."""
    begun, ended = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[begun : len(pattern) - ended].replace("/", "\\/")
    return f"/{'' if begun else '(?s:.*)'}({inner}){'' if ended else '(?s:.*)'}/"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", "\\/")
