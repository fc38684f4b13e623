"""Keys of training data: each is used, or refused by its name. What a key says is not dropped in silence."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weights_io.errors import MOST_NAMES, InputError, listed

SHOWN = 40  # characters of a name or a value in a sentence

# Where a line comes from and what it is about, which nothing is trained of. They are passed over, and said to be.
NOTES = frozenset(
    """id idx index uid uuid guid _id item_id line_id sample_id example_id doc_id document_id question_id prompt_id
    conversation_id dialog_id dialogue_id session_id message_id hash source dataset dataset_name data_source origin
    origins url license meta metadata category categories topic topics tags domain genre level difficulty language lang
    date timestamp created created_at split title model model_name""".split()
)
TURN_NOTES = frozenset("id uuid message_id hash timestamp created created_at".split())

# What is asked for by its name and cannot be done.
NOT_TRAINED = dict.fromkeys(("tools", "functions"), "cannot be trained; write them out in a system message")
NOT_TRAINED |= dict.fromkeys(
    ("tool_calls", "function_call", "tool_call_id"), "cannot be trained yet; write the call into the content"
)
NOT_TRAINED |= dict.fromkeys(
    ("reasoning_content", "reasoning", "thought", "thinking"),
    "cannot be trained under this key; write it into the content, as <think>\\n...\\n</think>\\n\\n before the answer",
)
NOT_TRAINED |= dict.fromkeys(
    ("image", "images", "video", "videos", "audio", "audios"), "cannot be trained; only text is"
)


@dataclass
class KeyRules:
    """Which keys may stand beside those that are used.

    Attributes:
        ignored: keys that the user wants passed over, in lines and in their messages.
        unused: those of them, and of the notes, that were met and said something.
    """

    ignored: Collection[str] = ()
    unused: dict[str, None] = field(default_factory=dict)

    def used(
        self, given: Mapping[str, Any], known: Collection[str], notes: Collection[str], what: str
    ) -> dict[str, Any]:
        """The items of ``given`` that are ``known``. InputError, whose subject is ``what``, for another key that says
        something (null, an empty text, list or object say nothing) and is neither a note nor ignored."""
        others = [key for key in given if key not in known and not says_nothing(given[key])]
        passed = [key for key in others if key in notes or key in self.ignored]
        self.unused.update(dict.fromkeys(passed))
        if refused := [key for key in others if key not in passed]:
            raise InputError(f"{what} {_refusal(refused)}")
        return {key: value for key, value in given.items() if key in known}

    def without_ignored(self, given: Mapping[str, Any], needed: Collection[str] = ()) -> dict[str, Any]:
        """``given`` less what the user wants passed over, known or not, but for the ``needed`` keys."""
        passed = [key for key in given if key in self.ignored and key not in needed]
        self.unused.update(dict.fromkeys(passed))
        return {key: value for key, value in given.items() if key not in passed}


def says_nothing(value: Any) -> bool:
    """Whether a value is null or empty, be it as the text of a JSON value (``"tools": "[]"``)."""
    if isinstance(value, str):
        return "".join(value[:SHOWN].split()) in ("", "[]", "{}", "null") and len(value.strip()) < SHOWN
    return value is None or (isinstance(value, list | dict) and not value)


def few(names: Collection[str], quote: str = '"') -> str:
    """At most three keys, and how many others there are."""
    return listed((f"{quote}{escaped(name)}{quote}" for name in names), last=" and ") or "none"


def escaped(value: Any) -> str:
    """A text as it is, another value as JSON; on one line, its end left out where it is long."""
    return as_json(value)[1:-1] if isinstance(value, str) else as_json(value)


def as_json(value: Any) -> str:
    """A value as JSON, of which the end is left out where it is long, and all of a list or an object."""
    if isinstance(value, list | dict):
        return "[...]" if isinstance(value, list) else "{...}"
    text = json.dumps(value[: SHOWN + 1] if isinstance(value, str) else value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..." + '"' * isinstance(value, str)


def _refusal(names: list[str]) -> str:
    reasons: Iterable[str] = (name for name in names if name in NOT_TRAINED)
    if (reason := next(iter(reasons), None)) is not None:
        return f'has "{reason}", which {NOT_TRAINED[reason]}.'
    them, which = ("it", "is") if len(names) == 1 else ("them", "are")
    flags = " ".join(escaped(name) for name in names[:MOST_NAMES]) + (" ..." if names[MOST_NAMES:] else "")
    return (
        f"has {few(names)}, which {which} not understood; remove {them}, or have {them} passed over with "
        f"--ignore-keys {flags}."
    )
