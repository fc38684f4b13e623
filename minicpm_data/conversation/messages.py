"""Messages in the one form that chat templates expect, from the forms in which clients and data write them.

`clean_messages` is the only place that does this, for the server, `chat`, the commands and training data.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from minicpm_data.keys import KeyRules, as_json, escaped
from weights_io.errors import InputError
from weights_io.files import json_text

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
RENAMED = {"developer": "system"}  # OpenAI's newer name
THOUGHTS = ("reasoning_content", "reasoning", "thought", "thinking")  # names of an answer's thought, ours first
KEYS_OF = {"assistant": ("tool_calls", *THOUGHTS), "tool": ("tool_call_id", "name")}  # beside role and content
PART_NOTES = ("cache_control",)
IMAGE_PARTS = ("image", "image_url", "input_image")  # types of parts that are images (`minicpm_data.images`)


def clean_messages(messages: Sequence[Message], rules: KeyRules | None = None) -> list[dict[str, Any]]:
    """Bring messages into the form that chat templates expect.

    A list of text parts becomes their joined text, null an empty text, the role "developer" "system". The arguments of
    a call become an object (they are a JSON text in OpenAI's API; an empty one is ``{}``), and a result that is no
    text becomes its JSON. The thought of an answer is under "reasoning_content", whichever of `THOUGHTS` it has.
    Neighboring results stand in the order of their calls, because templates write no ids.

    Arguments:
        messages: a list of objects with a role and a content each.
        rules: what is done with other keys; None refuses them.

    Returns:
        New messages with the keys "role" and "content". Answers may have "reasoning_content" and "tool_calls", and
        tool messages "tool_call_id" and "name".

    Raises:
        InputError: the list is empty, a message cannot be used, or a result has no call.
    """
    cleaned = [clean_message(message, f"message {i}", rules) for i, message in enumerate(checked_list(messages))]
    return [cleaned[i] for i in call_order(cleaned)]


def with_images(query: str, images: Sequence[Any]) -> str | list[dict[str, Any]]:
    """The content of a message with images before its text."""
    return (
        [*({"type": "image", "image": image} for image in images), {"type": "text", "text": query}] if images else query
    )


def checked_list(messages: Any) -> Sequence[Any]:
    """Return ``messages``. Raises `InputError` where it is no list, or an empty one."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InputError('must be a list such as [{"role": "user", "content": "Hello"}], with one or more.', "messages")
    return messages


def clean_message(message: Any, what: str, rules: KeyRules | None = None) -> dict[str, Any]:
    """Bring one message into the form that chat templates expect; as `clean_messages`, without the order."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise InputError(f'{what} must have a "role" and a "content".')
    role = message["role"]
    role = RENAMED.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise InputError(f"{what} has the role '{escaped(message['role'])}'; the roles are {', '.join(ROLES)}.")
    rules = rules or KeyRules()
    found = rules.used(message, ("role", "content", *KEYS_OF.get(role, ())), (), what)
    if "content" not in found and not (role == "assistant" and found.keys() - {"role"}):
        raise InputError(f'{what} must have a "role" and a "content".')
    cleaned = {"role": role, "content": _text(found.get("content"), role, what, rules)}
    if (thought := _thought(found, what)) is not None:
        cleaned["reasoning_content"] = thought
    if calls := found.get("tool_calls"):
        cleaned["tool_calls"] = _calls(calls, what, rules)
    for key in ("tool_call_id", "name"):
        if found.get(key) is not None:
            if not isinstance(found[key], str):
                raise InputError(f'{what} has "{key}": {as_json(found[key])}; it must be a text.')
            cleaned[key] = found[key]
    return cleaned


def _text(content: Any, role: str, what: str, rules: KeyRules) -> str:
    """The content as one text."""
    if isinstance(content, str):
        return content
    if content is None and role in ("assistant", "tool"):
        return ""
    if isinstance(content, list) and (role != "tool" or all(isinstance(p, Mapping) and "type" in p for p in content)):
        return "".join(_part(part, what, rules) for part in content)
    if role == "tool":
        return _json(content, f"the content of {what}")
    raise InputError(f"the content of {what} is of type {type(content).__name__}; it must be a string.")


def _part(part: Any, what: str, rules: KeyRules) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise InputError(f'{what} has a part of type {escaped(kind)!r}; only {{"type": "text"}} can be used.')
    found = rules.used(part, ("type", "text"), PART_NOTES, f"a part of {what}")
    if not isinstance(found.get("text"), str):
        raise InputError(f'{what} has a part whose "text" is no string; give it one.')
    return found["text"]


def _thought(found: Mapping[str, Any], what: str) -> str | None:
    """The thought of an answer; None where it has none."""
    given = {key: found[key] for key in THOUGHTS if found.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str):
            raise InputError(f'{what} has "{key}": {as_json(value)}; it must be a text.')
    if len({*given.values()}) > 1:
        names = " and ".join(f'"{key}"' for key in given)
        raise InputError(f"{what} has {names}, which differ; keep one of them.")
    return next(iter(given.values()), None)


def _calls(calls: Any, what: str, rules: KeyRules) -> list[dict[str, Any]]:
    """The calls of an answer, as ``{"id", "type", "function": {"name", "arguments"}}``."""
    if not isinstance(calls, list):
        raise InputError(f'{what} has "tool_calls": {as_json(calls)}; it must be a list of calls.')
    return [_call(call, f"call {i} of {what}", rules) for i, call in enumerate(calls)]


def _call(call: Any, what: str, rules: KeyRules) -> dict[str, Any]:
    bare = isinstance(call, Mapping) and "function" not in call  # the name and the arguments without a wrapper
    outer = ("id", "type", "name", "arguments") if bare else ("id", "type", "function")
    found = rules.used(call, outer, ("index",), what) if isinstance(call, Mapping) else {}
    function = found if bare else found.get("function")
    if not isinstance(function, Mapping) or found.get("type") not in (None, "function"):
        raise InputError(
            f'{what} is no call of a function; give {{"type": "function", "function": {{"name": ..., '
            '"arguments": ...}}.'
        )
    if not bare:
        function = rules.used(function, ("name", "arguments"), (), what)
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise InputError(f'{what} has no "name"; give it that of a function.')
    identity = found.get("id")
    if identity is not None and not isinstance(identity, str):
        raise InputError(f'{what} has "id": {as_json(identity)}; it must be a text.')
    named = {} if identity is None else {"id": identity}
    return {**named, "type": "function", "function": {"name": name, "arguments": _arguments(arguments, what)}}


def _arguments(arguments: Any, what: str) -> dict[str, Any]:
    """The arguments of a call as an object. OpenAI's API sends them as a JSON text."""
    what = f"arguments of {what}"
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if isinstance(arguments, str):
        arguments = json_text.loads(arguments, f"the text in {what}", remedy="give a JSON object")
    if not isinstance(arguments, Mapping):
        raise InputError(f"the {what} are {as_json(arguments)}; they must be a JSON object.")
    _json(arguments, f"the {what}")
    return dict(arguments)


def _json(value: Any, what: str) -> str:
    """A value as JSON. Raises `InputError` where it cannot be written."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what} cannot be written as JSON ({error}); give values of JSON.") from None


def call_order(messages: Sequence[Message]) -> list[int]:
    """The order of messages in which each run of results has the order of the calls that it follows.

    Arguments:
        messages: cleaned messages.

    Returns:
        The indices of the messages in that order.

    Raises:
        InputError: a result follows no call, has the id of none, or another result is missing before it.
    """
    order: list[int] = []
    calls: Sequence[Mapping[str, Any]] = ()
    i = 0
    while i < len(messages):
        end = i
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        if end > i:
            order += _run_order(messages, i, end, calls)
            calls, i = (), end
        else:
            calls = messages[i].get("tool_calls", ())
            order.append(i)
            i += 1
    return order


def _run_order(messages: Sequence[Message], first: int, end: int, calls: Sequence[Mapping[str, Any]]) -> list[int]:
    """The messages ``first`` to ``end`` (exclusive), all results, in the order of the calls."""
    if not calls:
        raise InputError(
            f"message {first} is the result of a tool, and the message before it has no tool_calls; give the "
            "assistant's message with the call."
        )
    if end - first > len(calls):
        raise InputError(f"there are {end - first} results for {len(calls)} calls before message {end}; remove some.")
    ids = [call.get("id") for call in calls]
    result_of: dict[int, int] = {}  # call -> message
    for i in range(first, end):
        wanted = messages[i].get("tool_call_id")
        if wanted is not None and any(identity is not None for identity in ids):
            call = next((k for k, identity in enumerate(ids) if identity == wanted and k not in result_of), None)
            if call is None:
                why = "which has a result already" if wanted in ids else "which no call before it has"
                raise InputError(f"message {i} has the tool_call_id '{escaped(wanted)}', {why}; give that of its call.")
            result_of[call] = i
    for i in range(first, end):  # those without an id
        if i not in result_of.values():
            result_of[next(k for k in range(len(calls)) if k not in result_of)] = i
    missing = next((k for k in range(end - first) if k not in result_of), None)
    if missing is not None:
        raise InputError(
            f"call {missing} of {len(calls)} before message {first} has no result, and a later one has; give it one."
        )
    for k, i in result_of.items():
        name, called = messages[i].get("name"), calls[k]["function"]["name"]
        if name is not None and name != called:
            raise InputError(
                f"message {i} has the name '{escaped(name)}', and its call is of '{escaped(called)}'; give that."
            )
    return [result_of[k] for k in range(end - first)]
