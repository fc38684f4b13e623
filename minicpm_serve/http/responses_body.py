"""What a request to ``/v1/responses`` may hold, and the chat that it asks for."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import field_validator

from minicpm_serve.http.schemas import ChatBody, Strict, valid
from weights_io.errors import InputError, listed, short

LOGPROBS = "message.output_text.logprobs"  # of ``include``
NO_STATE = "is not supported, because no answer is kept here; send the earlier messages in {input}."
OF_CHATS = {  # keys of a chat that have another name here
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "logprobs": "include",
    "response_format": "text",
}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # of what is not supported, the values with which it asks for nothing
    "background": (False,),
    "truncation": ("disabled",),
    "stream_options": ({}, {"include_obfuscation": False}, {"include_obfuscation": True}),
    "context_management": ([],),
    "n": (1,),
}
IMAGE = "input_image"  # the type of a part
NO_EFFECT = ("id", "status", "phase")  # keys of an item of ``input`` that was an output


class ResponsesBody(Strict):
    model: str | None = None
    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include: list[Any] | None = None
    top_logprobs: int | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None

    @field_validator("input", mode="plain")
    @classmethod
    def _one_shape(cls, given: Any) -> Any:
        if not isinstance(given, str | list):
            raise ValueError
        return given

    def chat(self) -> ChatBody:
        """The chat that the request asks for; its other keys are those of a chat. Raises `InputError`."""
        others = dict(self.model_extra or {})
        for name in ("previous_response_id", "conversation"):
            if others.pop(name, None) is not None:
                raise InputError(NO_STATE, option=name, others=["input"])
        for name in OF_CHATS.keys() & others.keys():
            raise InputError(f"is a key of chats; here it is {{{OF_CHATS[name]}}}.", name, [OF_CHATS[name]])
        for name in NEUTRAL.keys() & others.keys():
            if (value := others.pop(name)) is not None and value not in NEUTRAL[name]:
                raise InputError(f"is not supported; leave it out or give {json.dumps(NEUTRAL[name][0])}.", option=name)
        if any(value is not None for value in (self.reasoning or {}).values()):
            raise InputError("is not supported; leave it out.", option="reasoning")
        if unknown := [str(name) for name in self.include or () if name != LOGPROBS]:
            raise InputError(f"holds {short(unknown[0])!r}; it may hold {LOGPROBS!r} alone.", option="include")
        given = {
            "model": self.model,
            "messages": self._messages(),
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "tools": [_wrapped(tool) for tool in self.tools or ()] or None,
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "logprobs": LOGPROBS in (self.include or ()),
            "top_logprobs": self.top_logprobs,
        }
        return valid(ChatBody, {**others, **self._text(), **given})

    def _text(self) -> dict[str, Any]:
        """The keys of a chat in place of ``text``."""
        text = dict(self.text or {})
        kind, verbosity = text.pop("format", None), text.pop("verbosity", None)
        if text:
            raise InputError(f"holds {listed(sorted(text))}; it may hold format and verbosity.", option="text")
        if kind is not None and not isinstance(kind, dict):
            raise InputError(f"holds the format {short(json.dumps(kind))}; it must be an object.", option="text")
        if kind and kind.get("type") == "json_schema" and "json_schema" not in kind:  # chats wrap it
            schema = {key: value for key, value in kind.items() if key != "type"}
            kind = {"type": "json_schema", "json_schema": schema}
        asked = {"response_format": kind, "verbosity": verbosity}
        return {key: value for key, value in asked.items() if value is not None}

    def _messages(self) -> list[dict[str, Any]]:
        """Instructions and input as messages of a chat. Thought, text and calls of one answer become one message."""
        messages = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        answer: dict[str, Any] | None = None  # that is being put together
        for index, item in enumerate(self.input):
            made = _part(item, f"item {index}")
            if made["role"] != "assistant":
                messages.append(made)
                answer = None
            elif answer is None or (answer.get("content") and made.get("content")):
                messages.append(made)
                answer = made
            else:
                if calls := made.pop("tool_calls", []):
                    answer.setdefault("tool_calls", []).extend(calls)
                answer |= {key: value for key, value in made.items() if value}
        return messages


def _part(item: Any, what: str) -> dict[str, Any]:
    """An item of the input as a message, or as a part of an answer. Raises `InputError`."""
    if not isinstance(item, Mapping):
        raise InputError(f"holds {what}, which is no object; give messages.", option="input")
    item = {key: value for key, value in item.items() if key not in NO_EFFECT and value is not None}
    kind = item.pop("type", "message")
    known = {
        "message": {"role", "content"},
        "function_call": {"call_id", "name", "arguments"},
        "function_call_output": {"call_id", "output"},
        "reasoning": {"summary", "content", "encrypted_content"},
    }
    if not isinstance(kind, str) or kind not in known:
        types = ", ".join(known)
        raise InputError(f"holds {what} of type {short(str(kind))!r}; the types are {types}.", option="input")
    if unknown := sorted(map(str, item.keys() - known[kind])):
        raise InputError(f"holds {what} with {listed(unknown)}; leave it out.", option="input")
    needed = {"reasoning": set[str](), "function_call_output": {"call_id", "output"}}.get(kind, known[kind])
    if missing := sorted(needed - item.keys()):
        raise InputError(f"holds {what} without {listed(missing)}; give it.", option="input")
    match kind:
        case "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        case "function_call_output":
            return {"role": "tool", "tool_call_id": item["call_id"], "content": _text_of(item["output"], what)}
        case "reasoning":
            thought = _text_of(item.get("content") or [], what)
            return {"role": "assistant", "content": None, "reasoning_content": thought or None}
    content = item["content"]
    if isinstance(content, list) and any(isinstance(part, Mapping) and part.get("type") == IMAGE for part in content):
        return {"role": item["role"], "content": [_chat_part(part, what) for part in content]}
    return {"role": item["role"], "content": _text_of(content, what)}


def _chat_part(part: Any, what: str) -> dict[str, Any]:
    """A part of a message with images, as chats have it; there it is refused where the model does not see."""
    if not isinstance(part, Mapping) or part.get("type") != IMAGE:
        return {"type": "text", "text": _text_of([part], what)}
    others = {key: value for key, value in part.items() if (key, value) != ("detail", "auto") and value is not None}
    if unknown := sorted(others.keys() - {"type", "image_url"}):
        raise InputError(f"holds {what} with a part with {listed(unknown)}; leave it out.", option="input")
    return {"type": "image_url", "image_url": part.get("image_url")}


def _text_of(content: Any, what: str) -> str:
    """The text of a content: itself, or that of its parts. Raises `InputError`."""
    if isinstance(content, str):
        return content
    texts = []
    for given in content if isinstance(content, list) else [None]:
        part = given if isinstance(given, Mapping) else {}
        kinds = "input_text", "output_text", "reasoning_text", "text"
        if part.get("type") not in kinds or not isinstance(part.get("text"), str):
            raise InputError(f"holds {what} with a part that is no text; give input_text.", option="input")
        if unknown := sorted(part.keys() - {"type", "text", "annotations", "logprobs"}):
            raise InputError(f"holds {what} with a part with {listed(unknown)}; leave it out.", option="input")
        texts.append(part["text"])
    return "".join(texts)


def _wrapped(tool: Any) -> Any:
    """A tool in the form of a chat. What is wrong with one is said there."""
    if not isinstance(tool, Mapping) or "function" in tool:
        return tool
    kept = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    return {"type": tool.get("type"), "function": kept}
