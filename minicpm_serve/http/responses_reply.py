"""The JSON of ``/v1/responses``: the items of an output, and the events with which they come."""

import secrets
import time
from collections.abc import Iterator
from typing import Any

from minicpm_data.generation.responses import Response
from minicpm_serve.http.answers import Answer
from minicpm_serve.http.responses_body import ResponsesBody

Event = dict[str, Any]


class Reply:
    """One answer as an output of items: a thought, a message, and calls."""

    def __init__(self, body: ResponsesBody, model: str):
        self._body, self._model, self._began = body, model, int(time.time())
        self._id, self._numbers = _id("resp"), 0
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the item that is being written
        self._thought_tokens = 0
        self._described: list[Any] = []  # tokens whose probabilities have not been sent

    def begin(self) -> Iterator[Event]:
        """The events before the first token."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._json("in_progress"))

    def add(self, answer: Answer, response: Response) -> Iterator[Event]:
        """The events of the next token of an answer."""
        calls = answer.add(response)
        self._described += (answer.logprobs() or {}).get("content", [])
        if response.reasoning:
            self._thought_tokens += 1
            self._described = []  # those of a thought
            yield from self._write("reasoning", response.reasoning, [])
        if response.text or (self._described and self._open is not None and self._open["type"] == "message"):
            described, self._described = self._described, []
            yield from self._write("message", response.text, described)
        for call in calls:
            yield from self._close("completed")
            function = call["function"]
            item = {"type": "function_call", "id": _id("fc"), "call_id": call["id"], "name": function["name"]}
            item |= {"arguments": "", "status": "in_progress"}
            yield from self._begin(item)
            yield self._of_item("response.function_call_arguments.delta", delta=function["arguments"])
            item["arguments"] = function["arguments"]
            yield from self._close("completed")

    def end(self, reason: str | None, usage: dict[str, int]) -> Iterator[Event]:
        """The events after the last token."""
        status = "incomplete" if reason == "length" else "completed"
        if not self._items:  # an empty answer
            yield from self._write("message", "", [])
        yield from self._close(status)
        yield self._event(f"response.{status}", response=self._json(status, usage))

    def failed(self, error: dict[str, Any]) -> Event:
        """The event of an error in the stream."""
        return self._event("error", **{key: error[key] for key in ("message", "code", "param")}, error=error)

    def _write(self, kind: str, text: str, logprobs: list[Any]) -> Iterator[Event]:
        """Append a text to the open item of this type, or begin one."""
        name = "output_text" if kind == "message" else "reasoning_text"
        if self._open is None or self._open["type"] != kind:
            yield from self._close("completed")
            item: dict[str, Any] = {"type": kind, "id": _id("msg" if kind == "message" else "rs")}
            if kind == "message":
                item["role"] = "assistant"
            else:
                item["summary"] = []
            yield from self._begin({**item, "status": "in_progress", "content": []})
            assert self._open is not None
            part: dict[str, Any] = {"type": name, "text": ""}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
            yield self._of_item("response.content_part.added", content_index=0, part=dict(part))
            self._open["content"].append(part)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        told = {}
        if kind == "message":
            part["logprobs"].extend(logprobs)
            told = {"logprobs": logprobs}
        if text or logprobs:
            yield self._of_item(f"response.{name}.delta", content_index=0, delta=text, **told)

    def _begin(self, item: dict[str, Any]) -> Iterator[Event]:
        self._items.append(item)
        self._open = item
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=_copy(item))

    def _close(self, status: str) -> Iterator[Event]:
        """End the open item, if there is one."""
        item = self._open
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **done)
        else:
            (part,) = item["content"]
            told = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._of_item(f"response.{part['type']}.done", content_index=0, text=part["text"], **told)
            yield self._of_item("response.content_part.done", content_index=0, part=dict(part))
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=_copy(item))
        self._open = None

    def _of_item(self, kind: str, **fields: Any) -> Event:
        assert self._open is not None
        return self._event(kind, item_id=self._open["id"], output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._numbers += 1
        return {"type": kind, "sequence_number": self._numbers - 1, **fields}

    def _json(self, status: str, usage: dict[str, int] | None = None) -> dict[str, Any]:
        body, cut = self._body, status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._began,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": [_copy(item) for item in self._items],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else self._usage(usage),
            "metadata": body.metadata or {},
        }

    def _usage(self, usage: dict[str, int]) -> dict[str, Any]:
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._thought_tokens},
            "total_tokens": usage["total_tokens"],
        }


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """An item as it is now."""
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
