"""The JSON of answers: whole, and as chunks of a stream."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from minicpm_data.conversation.answers import ToolCall
from minicpm_data.conversation.regions import regions
from minicpm_data.generation.responses import Response
from minicpm_serve.http.logprobs import TokenLog

ID_BYTES = 12  # of the id of a call: 24 digits


@dataclass
class Answer:
    """An answer, as far as it has been received.

    Attributes:
        after_calls: the finish reason where the model ended the answer and called.
        of_images: whether the request has images, so that the text may name regions of them.
        log: of the probabilities of its tokens, where they are asked for.
        text, reasoning, calls: of the responses so far. The text may begin with the prompt.
        reason: why it ended; None while it has not.
    """

    after_calls: str = "tool_calls"
    of_images: bool = False
    log: TokenLog | None = None
    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None

    def add(self, response: Response) -> list[dict[str, Any]]:
        """Append a response, and return its calls in OpenAI's form."""
        if self.log is not None and response.token is not None:
            self.log.add(response.token, response.score)
        self.text += response.text
        self.reasoning += response.reasoning
        calls = [call_json(call) for call in response.tool_calls]
        self.calls += calls
        if response.finish_reason is not None:
            called = self.calls and response.finish_reason == "stop"
            self.reason = self.after_calls if called else response.finish_reason
        return calls

    def regions(self) -> list[dict[str, Any]]:
        """The regions that the text names (`Region`)."""
        return [asdict(region) for region in regions(self.text)] if self.of_images else []

    def logprobs(self) -> dict[str, Any] | None:
        """The probabilities of the tokens since the last call."""
        return None if self.log is None else self.log.take()


def call_json(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(ID_BYTES)}", "type": "function", "function": function}


@dataclass(frozen=True)
class Kind:
    """The JSON of an endpoint's answers.

    Attributes:
        name, piece_name: the ``object`` of a whole response, and of a chunk.
        prefix: of the id of a response.
        choice: index and answer -> a choice of a whole response.
        pieces: index, answer and its latest response -> the choices of the chunks that it makes.
        first: the delta before the first text; None where there is none.
    """

    name: str
    piece_name: str
    prefix: str
    choice: Callable[[int, Answer], dict]
    pieces: Callable[[int, Answer, Response], Iterator[dict]]
    first: dict[str, str] | None = None


def text_choice(index: int, answer: Answer) -> dict:
    return _text(index, answer.text, answer.reason, answer.logprobs())


def text_pieces(index: int, answer: Answer, response: Response) -> Iterator[dict]:
    answer.add(response)
    if response.text or response.finish_reason:
        yield _text(index, response.text, answer.reason, answer.logprobs())


def prompt_piece(index: int, answer: Answer) -> dict:
    """The choice of the chunk with the prompt that an answer begins with."""
    return _text(index, answer.text, None, answer.logprobs())


def _text(index: int, text: str, reason: str | None, logprobs: dict | None) -> dict:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def message_choice(index: int, answer: Answer) -> dict:
    """A message; its content is null where there is a thought or a call alone."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = answer.calls
    if named := answer.regions():
        message["regions"] = named
    if not answer.text and len(message) > 2:
        message["content"] = None
    return {"index": index, "message": message, "logprobs": answer.logprobs(), "finish_reason": answer.reason}


def message_pieces(index: int, answer: Answer, response: Response) -> Iterator[dict]:
    """The thought, the text, each call in two deltas, the regions at the end, and an empty delta with the finish
    reason."""
    first = len(answer.calls)
    calls = answer.add(response)
    if response.reasoning:
        yield delta_choice(index, {"reasoning_content": response.reasoning}, logprobs=answer.logprobs())
    if response.text:
        yield delta_choice(index, {"content": response.text}, logprobs=answer.logprobs())
    for number, call in enumerate(calls, first):
        begun = {**call, "function": {**call["function"], "arguments": ""}}
        yield delta_choice(index, {"tool_calls": [{"index": number, **begun}]})
        arguments = {"arguments": call["function"]["arguments"]}
        yield delta_choice(index, {"tool_calls": [{"index": number, "function": arguments}]})
    if answer.reason is not None:
        if named := answer.regions():
            yield delta_choice(index, {"regions": named})
        yield delta_choice(index, {}, answer.reason, answer.logprobs())


def delta_choice(index: int, delta: dict, reason: str | None = None, logprobs: dict | None = None) -> dict:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


CHAT_FIRST = {"role": "assistant", "content": ""}
CHAT = Kind("chat.completion", "chat.completion.chunk", "chatcmpl-", message_choice, message_pieces, CHAT_FIRST)
TEXT = Kind("text_completion", "text_completion", "cmpl-", text_choice, text_pieces)
