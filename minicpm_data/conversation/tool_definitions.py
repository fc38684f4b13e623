"""Definitions of tools, as a chat template writes them into a prompt."""

import json
import re
from collections.abc import Mapping
from typing import Any

from minicpm_data.keys import as_json, escaped
from weights_io.errors import InputError

NAME = re.compile(r"[\w.:/-]{1,128}")  # of a function; others would break the form of a call


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Check definitions of tools.

    Arguments:
        tools: a list of ``{"type": "function", "function": {"name", "description", "parameters"}}``, where the
            parameters are a JSON schema of an object; or of such functions without the wrapper. None or an empty list
            is no tools.

    Returns:
        The list as it was given; None for no tools.

    Raises:
        InputError: it is no such list, or two functions have one name.
    """
    if tools is None or (isinstance(tools, list | tuple) and not tools):
        return None
    if not isinstance(tools, list | tuple):
        raise InputError(
            f'must be a list of {{"type": "function", "function": {{...}}}}, not {as_json(tools)}.', "tools"
        )
    names = [_checked_name(tool, f"holds an item {i} that") for i, tool in enumerate(tools)]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise InputError(f"holds two functions of the name '{escaped(twice)}'; rename one of them.", "tools")
    try:
        json.dumps(tools, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"holds values that are none of JSON ({error}); give others.", "tools") from None
    return list(tools)


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool: its name, description and parameters, without the wrapper."""
    return tool.get("function", tool)


def _checked_name(tool: Any, what: str) -> str:
    """The name of a tool's function. Raises `InputError` where the tool cannot be used."""
    form = 'give {"type": "function", "function": {"name": ..., "parameters": {...}}}.'
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise InputError(f"{what} is no function; {form}", "tools")
    function = function_of(tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{what} has no name; {form}", "tools")
    name = function["name"]
    if not NAME.fullmatch(name):
        raise InputError(
            f"{what} has the name '{escaped(name)}'; a name has 1 to 128 letters, digits, _, -, ., : or /.", "tools"
        )
    if not isinstance(function.get("description", ""), str | None):
        raise InputError(f"{what} has a description that is no text; give a text.", "tools")
    _check_schema(function.get("parameters"), what)
    return name


def _check_schema(schema: Any, what: str) -> None:
    """Raises `InputError` where ``schema`` is no JSON schema of an object. None is a function without parameters."""
    if schema is None or schema == {}:
        return
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        given = as_json(schema.get("type") if isinstance(schema, Mapping) else schema)
        raise InputError(f'{what} has parameters of {given}; give a schema of {{"type": "object"}}.', "tools")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or not all(isinstance(p, Mapping | bool) for p in properties.values()):
        raise InputError(f"{what} has properties that are no object of schemas; give each parameter a schema.", "tools")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise InputError(f'{what} has a "required" that is no list of names; give one.', "tools")
