"""Decode a stream of tokens to text, in whole characters."""

import codecs
from collections.abc import Callable, Collection
from typing import Any

from weights_io.errors import InputError

BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}  # the byte pieces of SentencePiece
# A byte-level vocabulary writes each byte as one printable character: the printable ones of Latin-1 as themselves, the
# others as U+0100 and up (GPT-2, encoder.py).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF_CHAR = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


# The ByteFallback decoder of `tokenizers` also writes one U+FFFD for each byte that belongs to no character.
def _each_byte(error: Any) -> tuple[str, int]:
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("each_byte", _each_byte)


class Decoder:
    """The text of single tokens, from the ``decoder`` of a ``tokenizer.json``.

    ``piece(id)`` is bytes where the token may be a part of a character, and str otherwise.
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


# `tokenizers.decoders.DecodeStream` (0.23.3) is not used. It agrees on well-formed text, but not on arbitrary ids: with
# 300 random sequences of a byte-fallback vocabulary, 195 were split differently and 42 raised "Invalid prefix"; with a
# byte-level one, 230 were split differently. It also has no end, so the bytes of an unfinished character are lost.
class Detokenizer:
    """Decodes token by token, at constant cost per token. The joined results of `add` and `finish` are the whole text.

    `add` returns text that no later token can change; it is empty while a character is incomplete. Invalid bytes become
    U+FFFD.
    """

    def __init__(self, decoder: Decoder, skip: Collection[int] = ()):
        self._decoder = decoder
        self._skip = skip
        errors = "replace" if decoder.byte_level else "each_byte"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._strip = decoder.strip
        self._separator = ""

    def add(self, token_id: int) -> str:
        """The text that the next token makes complete."""
        if token_id in self._skip:
            return ""
        piece = self._decoder.piece(token_id)
        if isinstance(piece, bytes):
            return self._stripped(self._utf8.decode(piece))
        text = self._utf8.decode(b"", final=True) + self._separator + piece
        self._separator = self._decoder.separator
        return self._stripped(text)

    def finish(self) -> str:
        """The rest of the text: U+FFFD for an incomplete character, or nothing."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text
