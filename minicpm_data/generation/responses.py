"""The parts of an answer as they are handed out: text, token, why it ended."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from minicpm_data.tokenizer.detokenizer import Detokenizer
from weights_io.errors import InputError


@dataclass(frozen=True)
class Response:
    """One generated token: ``text`` is what became certain with it, perhaps ""."""

    text: str
    token: int | None
    finish_reason: str | None = None  # "stop": EOS or a stop string; "length": max_tokens; None: more to come
    from_draft: bool = False  # guessed, and found to be right


def stream_text(
    token_ids: Iterable[int],
    tokenizer,
    eos_token_ids: Collection[int] = (),
    stop: str | Sequence[str] = (),
    max_tokens: int = 256,
) -> Iterator[Response]:
    """One `Response` for each of ``token_ids`` until EOS, a stop string or ``max_tokens``; then no more are pulled.

    The texts joined are the answer, without EOS and without the stop string; text that may be the beginning of a stop
    string is held back until that is known. ``tokenizer`` None gives empty texts. Should ``token_ids`` end by itself
    while text is held back, a last Response carries it, with ``token`` None and the reason "length".

    Raises InputError for an empty stop string, or stop strings without a tokenizer.
    """
    stop = stop_strings(stop)
    if stop and tokenizer is None:
        raise InputError("stop strings need a tokenizer, and this checkpoint has none.")
    return _stream(token_ids, tokenizer and tokenizer.detokenizer(), frozenset(eos_token_ids), stop, max_tokens)


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One stop string or several as a tuple. InputError where one is empty."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise InputError("holds an empty text; leave it out.", option="stop")
    return stop


def _stream(token_ids, text_of: Detokenizer | None, eos: frozenset[int], stop: tuple[str, ...], max_tokens: int):
    held = ""
    for count, token in enumerate(islice(token_ids, max_tokens), 1):
        token = int(token)
        is_eos = token in eos
        reason = "stop" if is_eos else "length" if count == max_tokens else None
        if text_of:
            held += "" if is_eos else text_of.add(token)
            held += text_of.finish() if reason else ""
        found = [at for at in (held.find(string) for string in stop) if at >= 0]
        if found:
            yield Response(held[: min(found)], token, "stop")
            return
        ready = len(held) if reason else len(held) - _begun(held, stop)
        yield Response(held[:ready], token, reason)
        if reason:
            return
        held = held[ready:]
    held += text_of.finish() if text_of else ""
    if held:
        yield Response(held, None, "length")


def _begun(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop string."""
    most = len(text) + 1
    lengths = (n for string in stop for n in range(1, min(len(string), most)) if text.endswith(string[:n]))
    return max(lengths, default=0)
