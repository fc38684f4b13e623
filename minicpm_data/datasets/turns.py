"""The messages of training data: role, text, and whether the data wants them trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minicpm_data.conversation.messages import KEYS_OF, RENAMED, call_order, checked_list, clean_message
from minicpm_data.conversation.tool_definitions import checked_tools
from minicpm_data.keys import TURN_NOTES, KeyRules, as_json, escaped, few
from weights_io.errors import InputError
from weights_io.files import json_text

ROLE_OF = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
ROLE_OF |= {"chatgpt": "assistant"}  # of the first exports
CALL = "function_call"  # LLaMA-Factory's turn of calls: its value is their JSON
ROLE_OF |= {CALL: "assistant", "observation": "tool", "tool": "tool"}
WEIGHTS = ("weight", "loss", "train")  # keys of OpenAI, mlx_lm and other trainers: 0 or false, 1 or true


@dataclass(frozen=True)
class Turn:
    """A message.

    Attributes:
        weight: whether the data wants it trained; None where it does not say.
        asked: it is part of a prompt, whose answers are trained only where ``weight`` is True.
        more: the other keys of its message: the thought and the calls of an answer, the call of a result.
    """

    role: str
    content: str
    weight: bool | None = None
    asked: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def says_nothing(self) -> bool:
        """Whether it has no text, no thought and no call."""
        said = (self.content, self.more.get("reasoning_content") or "")
        return not any(text.strip() for text in said) and not self.more.get("tool_calls")

    def trained(self, mask_prompt: bool = True) -> bool:
        """Whether its tokens are targets. Without ``mask_prompt`` the tokens of prompts are targets too."""
        if self.weight is not None:
            return self.weight
        return not mask_prompt or (self.role == "assistant" and not self.asked)


@dataclass(frozen=True)
class Named:
    """The images that a line names.

    Attributes:
        sources: in the order of their places, or of the line.
        names: the tags of the sources; empty where all have the tag ``<image>``.
    """

    sources: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Messages, the tools that they may call, and the images that belong to their tags.

    Attributes:
        tools: their definitions; None where there are none.
    """

    turns: list[Turn]
    tools: list[dict[str, Any]] | None = None
    images: Named = Named()


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": turn.content, **turn.more} for turn in turns]


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a line: a list, or its JSON. Raises `InputError`."""
    if isinstance(value, str):
        value = json_text.loads(value, 'its "tools"', remedy="give a list of tools")
    return checked_tools(value)


def read_turns(value: Any, rules: KeyRules) -> list[Turn]:
    """The turns of a list of messages with ``role`` and ``content``, or ``from`` and ``value`` (ShareGPT).

    Raises:
        InputError: a key, role, content or weight cannot be used.
    """
    turns = [_turn(item, f"message {i}", rules) for i, item in enumerate(checked_list(value))]
    return [turns[i] for i in call_order(messages_of(turns))]


def _turn(item: Any, what: str, rules: KeyRules) -> Turn:
    """A message as a turn."""
    if not isinstance(item, Mapping):
        raise InputError(f'{what} must have a "role" and a "content".')
    role, content = ("from", "value") if "from" in item else ("role", "content")
    kept = rules.without_ignored(item, needed=(role, content))
    given = kept.get(role)
    if role == "from" and not (isinstance(given, str) and given in ROLE_OF):
        raise InputError(f"{what} is from {escaped(given)!r}; it must be from human, gpt, system, {CALL} or tool.")
    speaker = (ROLE_OF if role == "from" else RENAMED).get(given, given) if isinstance(given, str) else given
    more = KEYS_OF.get(speaker, ()) if isinstance(speaker, str) else ()
    found = rules.used(kept, (role, content, *more, *WEIGHTS), TURN_NOTES, what)
    said = {key: found[key] for key in more if found.get(key) is not None}
    if missing := [key for key in (role, content) if key not in found and not (said and key == content != role)]:
        raise InputError(f'{what} must have a "{role}" and a "{content}"; {few(missing)} is missing.')
    text = found.get(content)
    if role == "from" and given == CALL:
        said, text = {**said, "tool_calls": _calls(text, what)}, None
    message = clean_message({"role": speaker, "content": text, **said}, what, rules)
    weight = _weight(found, speaker, what)
    return Turn(message.pop("role"), message.pop("content"), weight, more=message)


def _calls(value: Any, what: str) -> list[Any]:
    """The calls of a turn whose text is their JSON: one object or a list."""
    if isinstance(value, str):
        value = json_text.loads(value, f"the call of {what}", remedy="give its name and arguments as JSON")
    return value if isinstance(value, list) else [value]


def _weight(found: Mapping[str, Any], role: Any, what: str) -> bool | None:
    """Whether the data wants a message trained; None where none of its keys says so."""
    given = {key: found[key] for key in WEIGHTS if found.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise InputError(f'{what} has "{key}": {as_json(value)}; a message is trained (1, true) or not (0, false).')
    if len({bool(value) for value in given.values()}) > 1:
        raise InputError(f"{what} has {few([*given])}, which say different things; keep one of them.")
    weight = next((bool(value) for value in given.values()), None)
    if weight and role != "assistant":
        raise InputError(
            f'{what} has "{next(iter(given))}": {as_json(next(iter(given.values())))}, and is no answer; only the '
            "assistant's messages are trained (all are with --train-on-prompt): remove the key."
        )
    return weight


def read_history(value: Any, rules: KeyRules) -> list[Turn]:
    """Earlier turns: pairs of question and answer, or messages."""
    if not isinstance(value, list) or any(isinstance(item, Mapping) for item in value):
        return read_turns(value, rules)
    turns = []
    for i, item in enumerate(value):
        if not (isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item)):
            raise InputError(f'it has a "history" whose item {i} is no pair of question and answer; make it one.')
        turns += asked(*item)
    return turns


def asked(question: str, answer: str) -> list[Turn]:
    return [Turn("user", question), Turn("assistant", answer)]


def response(document: Mapping[str, Any], key: str, role: str, rules: KeyRules) -> list[Turn]:
    """The turns of the text, the message or the list of messages under ``key``."""
    value = document[key]
    if isinstance(value, str):
        return [Turn(role, value)]
    if not isinstance(value, list | Mapping):
        kind = type(value).__name__
        raise InputError(f'it has a "{key}" of type {kind}; it must be a string or a list of messages.')
    return read_turns([value] if isinstance(value, Mapping) else value, rules)
