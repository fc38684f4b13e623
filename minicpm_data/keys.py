"""Keys of training data: every key is used, listed as ignored, or refused by name. None is dropped silently."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weights_io.errors import MOST_NAMES, InputError, listed

SHOWN = 40  # characters of a name or a value in a message

# Keys with metadata of a line, which are not trained. They are ignored, and the summary of a split lists them.
NOTES = frozenset(
    """id idx index uid uuid guid _id item_id line_id sample_id example_id doc_id document_id question_id prompt_id
    conversation_id dialog_id dialogue_id session_id message_id hash source dataset dataset_name data_source origin
    origins url license meta metadata category categories topic topics tags domain genre level difficulty language lang
    date timestamp created created_at split title model model_name""".split()
)
TURN_NOTES = frozenset("id uuid message_id hash timestamp created created_at".split())

# Keys that ask for something that is not supported -> the reason and the remedy.
NOT_TRAINED = {"functions": 'is an older form; write it as "tools"'}
NOT_TRAINED |= {"function_call": 'is an older form; write it as "tool_calls"'}
NOT_TRAINED |= dict.fromkeys(
    ("tool_calls", "reasoning_content", "reasoning", "thought", "thinking"), "only an answer can have; remove it"
)
NOT_TRAINED |= {"tool_call_id": "only the result of a tool can have; remove it"}
NOT_TRAINED |= dict.fromkeys(
    ("image", "images", "video", "videos", "audio", "audios"), "cannot be trained; only text is"
)


@dataclass
class KeyRules:
    """The rules for keys that are not used.

    Attributes:
        ignored: keys that the user wants ignored, in lines and in their messages.
        unused: the ignored keys and notes that were found with a value.
    """

    ignored: Collection[str] = ()
    unused: dict[str, None] = field(default_factory=dict)

    def used(
        self, given: Mapping[str, Any], known: Collection[str], notes: Collection[str], what: str
    ) -> dict[str, Any]:
        """The items of an object whose keys are known.

        Arguments:
            given: the object.
            known: the keys that are used.
            notes: metadata keys, which are ignored.
            what: the subject of the message.

        Returns:
            The items with a known key.

        Raises:
            InputError: another key has a value (not null and not empty) and is not ignored.
        """
        others = [key for key in given if key not in known and not says_nothing(given[key])]
        passed = [key for key in others if key in notes or key in self.ignored]
        self.unused.update(dict.fromkeys(passed))
        if refused := [key for key in others if key not in passed]:
            raise InputError(f"{what} {_refusal(refused)}")
        return {key: value for key, value in given.items() if key in known}

    def without_ignored(self, given: Mapping[str, Any], needed: Collection[str] = ()) -> dict[str, Any]:
        """Drop the keys that the user wants ignored.

        Arguments:
            given: the object.
            needed: keys that are kept even if they are ignored.

        Returns:
            The remaining items.
        """
        passed = [key for key in given if key in self.ignored and key not in needed]
        self.unused.update(dict.fromkeys(passed))
        return {key: value for key, value in given.items() if key not in passed}


def says_nothing(value: Any) -> bool:
    """Whether a value is null or empty, or a text that holds such a JSON value (``"tools": "[]"``)."""
    if isinstance(value, str):
        return "".join(value[:SHOWN].split()) in ("", "[]", "{}", "null") and len(value.strip()) < SHOWN
    return value is None or (isinstance(value, list | dict) and not value)


def few(names: Collection[str], quote: str = '"') -> str:
    """Name at most three keys, and the number of other keys.

    Arguments:
        names: the keys.
        quote: put before and after each key.

    Returns:
        The list for a message; ``none`` where there are no keys.
    """
    return listed((f"{quote}{escaped(name)}{quote}" for name in names), last=" and ") or "none"


def escaped(value: Any) -> str:
    """A text, or another value as JSON, on one line and cut to `SHOWN` characters."""
    return as_json(value)[1:-1] if isinstance(value, str) else as_json(value)


def as_json(value: Any) -> str:
    """A value as JSON, cut to `SHOWN` characters; ``[...]`` or ``{...}`` for a list or an object."""
    if isinstance(value, list | dict):
        return "[...]" if isinstance(value, list) else "{...}"
    text = json.dumps(value[: SHOWN + 1] if isinstance(value, str) else value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..." + '"' * isinstance(value, str)


def _refusal(names: list[str]) -> str:
    """The end of a message that refuses keys: the reason and the remedy."""
    reasons: Iterable[str] = (name for name in names if name in NOT_TRAINED)
    if (reason := next(iter(reasons), None)) is not None:
        return f'has "{reason}", which {NOT_TRAINED[reason]}.'
    them, which = ("it", "is") if len(names) == 1 else ("them", "are")
    flags = " ".join(escaped(name) for name in names[:MOST_NAMES]) + (" ..." if names[MOST_NAMES:] else "")
    return (
        f"has {few(names)}, which {which} not understood; remove {them}, or have {them} ignored with "
        f"--ignore-keys {flags}."
    )
