"""The messages of training data: role, text, and whether the data wants them trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minicpm_data.keys import TURN_NOTES, KeyRules, as_json, escaped, few
from minicpm_data.tokenizer.chat_template import check_messages
from weights_io.errors import InputError

ROLE_OF = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
ROLE_OF |= {"chatgpt": "assistant"}  # of the first exports
WEIGHTS = ("weight", "loss", "train")  # keys of OpenAI, mlx_lm and other trainers: 0 or false, 1 or true


@dataclass(frozen=True)
class Turn:
    """A message.

    Attributes:
        weight: whether the data wants it trained; None where it does not say.
        asked: it is part of a prompt, whose answers are trained only where ``weight`` is True.
    """

    role: str
    content: str
    weight: bool | None = None
    asked: bool = False

    def trained(self, mask_prompt: bool = True) -> bool:
        """Whether its tokens are targets. Without ``mask_prompt`` the tokens of prompts are targets too."""
        if self.weight is not None:
            return self.weight
        return not mask_prompt or (self.role == "assistant" and not self.asked)


def messages_of(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def read_turns(value: Any, rules: KeyRules) -> list[Turn]:
    """The turns of a list of messages with ``role`` and ``content``, or ``from`` and ``value`` (ShareGPT).

    Raises:
        InputError: a key, role, content or weight cannot be used.
    """
    if not isinstance(value, list):
        check_messages(value)
    read = [_turn(item, i, rules) for i, item in enumerate(value)]
    messages = check_messages([message for message, _ in read])
    weights = [weight for _, weight in read]
    return [Turn(m["role"], m["content"], weight) for m, weight in zip(messages, weights, strict=True)]


def _turn(item: Any, i: int, rules: KeyRules) -> tuple[Any, bool | None]:
    """A message of role and content, not checked yet, and its weight."""
    if not isinstance(item, Mapping):
        return item, None
    what = f"message {i}"
    role, content = ("from", "value") if "from" in item else ("role", "content")
    kept = rules.without_ignored(item, needed=(role, content))
    found = rules.used(kept, (role, content, *WEIGHTS), TURN_NOTES, what)
    if missing := [key for key in (role, content) if key not in found]:
        raise InputError(f'{what} must have a "{role}" and a "{content}"; {few(missing)} is missing.')
    speaker = found[role]
    if role == "from":
        if not isinstance(speaker, str) or speaker not in ROLE_OF:
            raise InputError(f"{what} is from {escaped(speaker)!r}; it must be from human, gpt or system.")
        speaker = ROLE_OF[speaker]
    speaker = "system" if speaker == "developer" else speaker  # OpenAI's newer name
    return {"role": speaker, "content": _content(found[content], what, rules)}, _weight(found, speaker, what)


def _content(value: Any, what: str, rules: KeyRules) -> Any:
    """The joined text of a list of parts; any other value unchanged."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise InputError(f'{what} has a part of type {escaped(kind)!r}; only {{"type": "text"}} can be trained.')
        found = rules.used(part, ("type", "text"), (), f"a part of {what}")
        if not isinstance(found.get("text"), str):
            raise InputError(f'{what} has a part whose "text" is no string; give it one.')
        texts.append(found["text"])
    return "".join(texts)


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
