"""The forms that fine-tuning data comes in, told apart by their keys: each to a conversation, a text or a pair."""

from collections.abc import Callable, Mapping
from typing import Any

from minicpm_data.chat import check_messages
from weights_io.errors import InputError

Document = Mapping[str, Any]
Keys = tuple[str, ...]
Messages = list[dict[str, str]]

ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# The question with which OpenBMB tunes on OCNLI (finetune/lora_finetune_ocnli.ipynb): one colon is ASCII, one is not.
OCNLI_QUESTION = "请判断下边两个句子的关系属于 [entailment, neutral, contradiction]中的哪一种？\n句子1: {}\n句子2：{}\n"


def _asked(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _messages(document: Document) -> Messages:
    return check_messages(_turns(document["messages"]))


def _conversations(document: Document) -> Messages:
    """``system`` beside the turns is the system message, as LLaMA-Factory has it."""
    turns = check_messages(_turns(document["conversations"]))
    system = _text(document, "system") if document.get("system") else ""
    return [{"role": "system", "content": system}, *turns] if system else turns


# keys -> conversation. Other keys than these may stand beside them (an id, a source).
CONVERSATIONS: dict[Keys, Callable[[Document], Messages]] = {
    ("messages",): _messages,
    ("conversations",): _conversations,
    ("prompt", "completion"): lambda d: _asked(_text(d, "prompt"), _text(d, "completion")),
    ("content", "summary"): lambda d: _asked(_text(d, "content"), _text(d, "summary")),  # AdvertiseGen
    # OpenBMB's mlx_AdvertiseGen, in which the input comes first
    ("input", "prompt", "output"): lambda d: _asked(_text(d, "input") + _text(d, "prompt"), _text(d, "output")),
    ("sentence1", "sentence2", "label"): lambda d: _asked(  # OCNLI
        OCNLI_QUESTION.format(_text(d, "sentence1"), _text(d, "sentence2")), _text(d, "label")
    ),
}
PAIRS: dict[Keys, Callable[[Document], Messages]] = {
    ("conversations", "chosen", "rejected"): _conversations,
    ("prompt", "chosen", "rejected"): lambda d: check_messages(_response(d["prompt"], "user")),
}


def conversation(document: Document) -> Messages | str:
    """The messages of a document of any form, or its text. InputError where the form is not known."""
    keys = _form(document, [*CONVERSATIONS, ("text",)], [*PAIRS], "these are preference pairs, for --loss dpo or orpo")
    return _text(document, "text") if keys == ("text",) else CONVERSATIONS[keys](document)


def pair(document: Document) -> tuple[Messages, Messages]:
    """Two conversations that differ in their last message, an answer: the chosen and the rejected one."""
    keys = _form(document, [*PAIRS], [], "")
    prompt = PAIRS[keys](document)
    return _answered(prompt, document, "chosen"), _answered(prompt, document, "rejected")


def _form(document: Document, known: list[Keys], others: list[Keys], what: str) -> Keys:
    """The one of ``known`` whose keys the document has; ``others`` are forms of another use, which is ``what``."""
    if document.get("tools"):
        raise InputError('it has "tools", which cannot be trained; write them out in a system message.')
    found = [keys for keys in known if all(key in document for key in keys)]
    other = any(all(key in document for key in keys) for keys in others)
    if len(found) == 1 and not other:
        return found[0]
    keys = ", ".join(map(str, document)) or "none"
    forms = "; ".join(" + ".join(form) for form in known)
    why = what if other else "that is none of the known forms" if not found else "that is more than one form"
    raise InputError(f"it has the keys {keys}: {why}; the forms are: {forms}.")


def _answered(prompt: Messages, document: Document, key: str) -> Messages:
    """``prompt`` and the answer ``key``, whose messages may repeat the prompt."""
    answer = check_messages(_response(document[key], "assistant"))
    if answer[: len(prompt)] == prompt:
        answer = answer[len(prompt) :]
    if [message["role"] for message in answer] != ["assistant"]:
        raise InputError(f'it has a "{key}" that is not one answer; make it a string or one message of the assistant.')
    return [*prompt, *answer]


def _response(value: Any, role: str) -> Any:
    """Messages out of a string, a message or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _turns([value] if isinstance(value, Mapping) else value)


def _turns(value: Any) -> Any:
    """A list of messages, in which those of ``from`` and ``value`` (sharegpt) are renamed; others stay as they are."""
    if not isinstance(value, list):
        return value
    return [_renamed(turn) if isinstance(turn, Mapping) and "from" in turn else turn for turn in value]


def _renamed(turn: Mapping[str, Any]) -> dict[str, Any]:
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in ROLE_OF:
        raise InputError(f"it has a turn from {speaker!r}; known are {', '.join(ROLE_OF)}.")
    if "value" not in turn:
        raise InputError('it has a turn with "from" but no "value"; add it.')
    return {"role": ROLE_OF[speaker], "content": turn["value"]}


def _text(document: Document, key: str) -> str:
    if not isinstance(document[key], str):
        raise InputError(f'it has a "{key}" of type {type(document[key]).__name__}; it must be a string.')
    return document[key]
