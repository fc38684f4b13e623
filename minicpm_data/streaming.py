"""Text as it is generated: whole characters only, up to a stop string or the end of the answer."""

import codecs
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from weights_io.errors import InputError

BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}  # the byte pieces of SentencePiece
# A byte-level vocabulary writes each byte as one printable character: the printable ones of Latin-1 as themselves, the
# others as U+0100 and up (GPT-2, encoder.py).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF_CHAR = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


# One U+FFFD for each byte that belongs to no character, as the ByteFallback decoder of `tokenizers` writes them.
def _each_byte(error: Any) -> tuple[str, int]:
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("each_byte", _each_byte)


class Decoder:
    """What each token adds to the text, by the ``decoder`` of a ``tokenizer.json``.

    ``piece(id)`` is bytes where the token may be part of a character, str where it is text by itself.
    """

    def __init__(self, spec: dict | None, id_to_token: Callable[[int], str | None]):
        steps = spec["decoders"] if spec and spec["type"] == "Sequence" else [spec] if spec else []
        kinds = [step["type"] for step in steps]
        self.byte_level = kinds == ["ByteLevel"]
        self.separator = "" if steps else " "  # no decoder: tokens are words
        self.strip = 0
        self._replace = []
        for i, step in enumerate(steps):
            match step:
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    self._replace.append((old, new))
                case {"type": "Strip", "content": " ", "start": start, "stop": 0} if "Fuse" in kinds[:i]:
                    self.strip = start
                case {"type": "ByteFallback" | "Fuse"}:
                    pass
                case _ if not self.byte_level:
                    raise InputError(f"tokenizer.json has the decoder {step['type']}, which is not supported here.")
        self._byte_tokens = BYTE_TOKENS if "ByteFallback" in kinds else {}
        self._id_to_token = id_to_token
        self._cache: dict[int, str | bytes] = {}

    def piece(self, token_id: int) -> str | bytes:
        if token_id not in self._cache:
            self._cache[token_id] = self._piece(self._id_to_token(token_id))
        return self._cache[token_id]

    def _piece(self, token: str | None) -> str | bytes:
        if token is None:  # a padding row of the embedding
            return b""
        if self.byte_level:
            known = all(char in BYTE_OF_CHAR for char in token)
            return bytes(BYTE_OF_CHAR[char] for char in token) if known else token.encode()
        if token in self._byte_tokens:
            return self._byte_tokens[token]
        for old, new in self._replace:
            token = token.replace(old, new)
        return token


class Detokenizer:
    """Ids in, text out, at constant cost per token. All that `add` and `finish` return, joined, is the decoded text.

    `add` returns text that no later token can change: "" while a character is incomplete. Bytes that form no
    character come out as U+FFFD.
    """

    def __init__(self, decoder: Decoder, skip: Collection[int] = ()):
        self._decoder = decoder
        self._skip = skip
        errors = "replace" if decoder.byte_level else "each_byte"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._strip = decoder.strip
        self._separator = ""

    def add(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        piece = self._decoder.piece(token_id)
        if isinstance(piece, bytes):
            return self._stripped(self._utf8.decode(piece))
        text = self._utf8.decode(b"", final=True) + self._separator + piece
        self._separator = self._decoder.separator
        return self._stripped(text)

    def finish(self) -> str:
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


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
        raise InputError("a stop string must not be empty.")
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
