"""The parts of a streamed answer: text, token and finish reason."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from minicpm_data.conversation.answers import AnswerParser, Content, Reasoning, ToolCall
from minicpm_data.generation.token_scores import TokenScore
from minicpm_data.tokenizer.detokenizer import Detokenizer
from weights_io.errors import InputError, short


@dataclass(frozen=True)
class Response:
    """One generated token.

    ``text`` and ``reasoning`` are the text of the answer and of the thought that it completes; either may be empty.
    ``tool_calls`` are the calls of tools that it completes. ``score`` is its probability, where a request to an engine
    asks for it.
    """

    text: str
    token: int | None
    finish_reason: str | None = None  # "stop": EOS or a stop string; "length": max_tokens; None: not finished
    from_draft: bool = False  # an accepted draft token of speculative decoding
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    score: TokenScore | None = None


def stream_text(
    token_ids: Iterable[int],
    tokenizer,
    eos_token_ids: Collection[int] = (),
    stop: str | Sequence[str] = (),
    max_tokens: int = 256,
    parser: AnswerParser | None = None,
) -> Iterator[Response]:
    """Decode a stream of tokens, and end it at EOS, at a stop string or after ``max_tokens``.

    The joined texts are the answer, without EOS and without the stop string. Text that may be the start of a stop
    string is held back until the next tokens decide.

    Arguments:
        token_ids: the stream; no token is pulled after the end.
        tokenizer: None gives empty texts.
        eos_token_ids: ids that end the answer.
        stop: strings that end the answer; in the thought they are text.
        max_tokens: most tokens.
        parser: separates thought and tool calls from the answer, and may end it after a call; None: the texts are all
            that is generated.

    Returns:
        An iterator with one `Response` per token. If ``token_ids`` ends while text is held back, a last one has this
        text, ``token`` None and the finish reason "length".

    Raises:
        InputError: a stop string is empty, or there are stop strings and no tokenizer.
    """
    stop = stop_strings(stop)
    if stop and tokenizer is None:
        raise InputError("stop strings need a tokenizer, and this checkpoint has none.")
    if tokenizer is None:
        return _stream(token_ids, None, frozenset(eos_token_ids), stop, max_tokens)
    detokenizer = tokenizer.detokenizer() if parser is None else tokenizer.detokenizer(tags=True)
    text_of = SeparatedText(detokenizer, parser)
    return _stream(token_ids, text_of, frozenset(eos_token_ids), stop, max_tokens)


class SeparatedText:
    """Decodes token by token to the text of the answer.

    Attributes:
        thought, calls: what the last token completed besides text.
        done: nothing more of the answer is of use.
    """

    def __init__(self, detokenizer: Detokenizer, parser: AnswerParser | None):
        self._detokenizer, self._parser = detokenizer, parser
        self.thought, self.calls = "", tuple[ToolCall, ...]()
        self.done = False

    def next(self, token: int | None, last: bool) -> str:
        """The text that the next token completes; None is a token without text. ``last``: the answer ends."""
        text = "" if token is None else self._detokenizer.add(token)
        text += self._detokenizer.finish() if last else ""
        if self._parser is None:
            return text
        pieces = [*self._parser.feed(text), *(self._parser.finish() if last else ())]
        self.thought = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        self.calls = tuple(piece for piece in pieces if isinstance(piece, ToolCall))
        self.done = self._parser.done
        return "".join(piece.text for piece in pieces if isinstance(piece, Content))


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One or several stop strings as a tuple. Raises `InputError` where one is empty."""
    if not isinstance(stop, str | Iterable) or any(not isinstance(text, str) for text in stop):
        raise InputError(f"is {short(repr(stop))}; it must be a text or a list of texts.", option="stop")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise InputError("holds an empty text; leave it out.", option="stop")
    return stop


def _stream(token_ids, text_of: SeparatedText | None, eos: frozenset[int], stop: tuple[str, ...], max_tokens: int):
    held = ""
    for count, token in enumerate(islice(token_ids, max_tokens), 1):
        token = int(token)
        is_eos = token in eos
        reason = "stop" if is_eos else "length" if count == max_tokens else None
        if text_of:
            held += text_of.next(None if is_eos else token, reason is not None)
            reason = "stop" if text_of.done and not reason else reason
        found = [at for at in (held.find(string) for string in stop) if at >= 0]
        if found:
            yield _response(held[: min(found)], token, "stop", text_of)
            return
        ready = len(held) if reason else len(held) - _begun(held, stop)
        yield _response(held[:ready], token, reason, text_of)
        if reason:
            return
        held = held[ready:]
    if text_of:
        last = _response(held + text_of.next(None, True), None, "length", text_of)
        if last.text or last.reasoning or last.tool_calls:
            yield last


def _response(text: str, token: int | None, reason: str | None, text_of: SeparatedText | None) -> Response:
    thought, calls = (text_of.thought, text_of.calls) if text_of else ("", ())
    return Response(text, token, reason, reasoning=thought, tool_calls=calls)


def _begun(text: str, stop: tuple[str, ...]) -> int:
    """The number of characters at the end of ``text`` that may be the start of a stop string."""
    most = len(text) + 1
    lengths = (n for string in stop for n in range(1, min(len(string), most)) if text.endswith(string[:n]))
    return max(lengths, default=0)
