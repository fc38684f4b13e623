"""The value of a parameter that a model wrote as text, by the JSON schema of the tool."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minicpm_data.conversation.literals import NoLiteral, json_value, python_value

TYPES = ("null", "boolean", "integer", "number", "array", "object")  # the order in which a text is tried as these


def value_of(texts: Sequence[str], schema: Any, root: Any) -> Any:
    """What a text means.

    Arguments:
        texts: the value as text; further ones are tried where the first does not fit.
        schema: of the parameter. Without a type, any JSON or Python literal is taken. In a union, null comes first
            and string last.
        root: the schema that references begin at.

    Returns:
        A JSON value; the first text, where it fits no other type.
    """
    types, members = _types(schema, root), _members(schema, root)
    if types == {"string"}:
        return texts[0]
    readings = [value for text in texts for value in _literal(text)]
    for value in readings:
        if _is_member(value, members):
            return value
    if texts[0] in members:
        return texts[0]
    types = types or _types_of(members)
    for kind in TYPES if types else ():
        for value in readings:
            fits, value = _as(kind, value)
            if fits and kind in types:
                return value
    return readings[0] if readings and not types else texts[0]


def _literal(text: str) -> list[Any]:
    """The value that a text is as JSON, else as a Python literal; empty where it is none."""
    for read in (json_value, python_value):
        try:
            return [read(text)]
        except NoLiteral:
            continue
    return []


def _as(kind: str, value: Any) -> tuple[bool, Any]:
    """Whether a value has a type of JSON schema, and the value: 3.0 is the integer 3."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match kind:
        case "null":
            return value is None, value
        case "boolean":
            return isinstance(value, bool), value
        case "integer":
            whole = number and value == int(value)
            return whole, int(value) if whole else value
        case "number":
            return number, value
        case "array":
            return isinstance(value, list), value
        case "object":
            return isinstance(value, dict), value
        case _:
            return isinstance(value, str), value


def _types(schema: Any, root: Any) -> set[str]:
    """The types that a schema names or shows; empty where it takes all."""
    return {kind for part in _parts(schema, root) for kind in _own_types(part)}


def _own_types(schema: Mapping[str, Any]) -> Iterator[str]:
    named = schema.get("type")
    if isinstance(named, str):
        yield named
    elif isinstance(named, list):
        yield from (kind for kind in named if isinstance(kind, str))
    elif "properties" in schema or "additionalProperties" in schema:
        yield "object"
    elif "items" in schema or "prefixItems" in schema:
        yield "array"
    if schema.get("nullable") is True:
        yield "null"


def _members(schema: Any, root: Any) -> list[Any]:
    """The values of ``enum`` and ``const`` of schemas without a type."""
    found: list[Any] = []
    for part in _parts(schema, root):
        if not part.get("type"):
            found += part["enum"] if isinstance(part.get("enum"), list) else []
            found += [part["const"]] if "const" in part else []
    return found


def _types_of(members: list[Any]) -> set[str]:
    return {kind for value in members for kind in (*TYPES, "string") if _as(kind, value)[0]}


def _is_member(value: Any, members: list[Any]) -> bool:
    return any(value == member and isinstance(value, bool) == isinstance(member, bool) for member in members)


def _parts(schema: Any, root: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and the schemas that it joins: references inside of the document, each once, and unions."""
    left, seen = [schema], set()
    while left:
        part = left.pop()
        if not isinstance(part, Mapping):
            continue
        yield part
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#") and reference not in seen:
            seen.add(reference)
            left.append(resolved_reference(reference, root))
        for key in ("anyOf", "oneOf", "allOf"):
            if isinstance(joined := part.get(key), list):
                left += joined


def resolved_reference(reference: str, root: Any) -> Any:
    found = root
    for key in reference[1:].split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
