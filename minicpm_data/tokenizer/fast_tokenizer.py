"""All calls of the `tokenizers` library. Its errors and its Rust panics become `InputError`.

A ``tokenizer.json`` is a small program. A Rust panic leaves the library as an exception that does not derive from
`Exception`, and prints a stack trace on file descriptor 2. Steps that make a text many times longer would use all
memory.
"""

import functools
import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from weights_io.errors import InputError

LONGEST = 1000  # most characters that the steps make of one, and most ids around a text; released files reach 12 and 2
MOST_STEPS = 1000  # each processes the whole text: 200,000 take seconds for one word; released files have up to 20
LONGEST_ADDED = 2**24  # characters of all added tokens, which are normalized too; Gemma's 6,400 have 80,000
MOST_ADDED = 100_000  # added tokens; the library takes 5 s for them
PROBE = 'aA1 . \t\n你好é👍\u0301\u200b\x00"</s>'  # characters of each kind; a panic over them shows at load time


class FastTokenizer:
    """A `tokenizers.Tokenizer` as this package uses it. Every method raises `InputError`, which names ``source``."""

    def __init__(self, spec: Mapping[str, Any], source: str | Path):
        """
        Arguments:
            spec: the contents of a ``tokenizer.json``.
            source: the name of the file in an error.

        Raises:
            InputError: ``spec`` does not describe a tokenizer, or fails in `check_growth`.
        """
        import tokenizers

        self.source = source
        check_growth(spec, source)
        with self._calling("does not describe a tokenizer", "download it again"):
            self._fast = tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
            self._fast.no_truncation()
            self._fast.no_padding()
            self.kind = type(self._fast.model).__name__
            self.normalizer, self.pre_tokenizer, self.decoder = map(
                _state, (self._fast.normalizer, self._fast.pre_tokenizer, self._fast.decoder)
            )
            try:
                self._fast.encode(PROBE, add_special_tokens=False)
            except Exception:  # only about this text, such as a character that the vocabulary lacks; a panic propagates
                pass

    def encode(self, text: str):
        """The `Encoding` of ``text`` (``ids``, ``offsets``), with nothing added before or after it."""
        with self._calling("cannot encode this text", "get the tokenizer files again"):
            # `encode_batch` lets other threads run. `encode` holds Python's lock, 1 s for a million characters.
            (encoding,) = self._fast.encode_batch([text], add_special_tokens=False)
            return encoding

    @property
    def model(self) -> Any:
        """The library's model (``byte_fallback``, ``unk_token``, ``fuse_unk``)."""
        return self._fast.model

    def around(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor writes before and after a text."""
        with self._calling("has a post_processor that cannot be used", "get the tokenizer files again"):
            probe = self._fast.encode("", add_special_tokens=False)
            probe.pad(1)  # one token, whatever the vocabulary can spell
            full = self._fast.post_process(probe)
        if 0 not in full.sequence_ids:
            raise InputError(f"{self.source} has a post_processor that leaves out the text; get it again.")
        at = full.sequence_ids.index(0)
        return full.ids[:at], full.ids[at + 1 :]

    def token_to_id(self, token: str) -> int | None:
        return self._fast.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._fast.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def vocabulary(self, added: bool = True) -> dict[str, int]:
        """Token -> id, with or without the added tokens."""
        return self._fast.get_vocab(with_added_tokens=added)

    def added_tokens(self) -> dict[int, Any]:
        """Id -> `AddedToken` (``content``, ``special``)."""
        return self._fast.get_added_tokens_decoder()

    def spec(self) -> dict[str, Any]:
        """The contents of a ``tokenizer.json``."""
        return json.loads(self._fast.to_str())

    @contextmanager
    def _calling(self, fault: str, remedy: str) -> Iterator[None]:
        try:
            with panics_unprinted():
                yield
        except BaseException as error:
            # The library raises no more specific class, and the class of a panic cannot be imported.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise InputError(f"{self.source} {fault} ({reason}); {remedy}.") from None


def _state(part: Any) -> dict[str, Any] | None:
    """A step as described in a ``tokenizer.json``; None where there is none."""
    return json.loads(part.__getstate__()) if part else None


AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")  # texts that are added to characters of a word
TEXT_STEPS = ("normalizer", "pre_tokenizer")


def check_growth(spec: Mapping[str, Any], source: str | Path) -> None:
    """Check that the steps of a ``tokenizer.json`` cannot make a text far too long.

    Arguments:
        spec: the contents of the file.
        source: the name of the file in an error.

    Raises:
        InputError: ``spec`` does not describe a tokenizer; the steps could make a text more than `LONGEST` times longer
            or are more than `MOST_STEPS`; or there are more than `MOST_ADDED` added tokens, or more than
            `LONGEST_ADDED` characters in them after normalization.
    """
    try:
        added = [len(token["content"]) for token in spec.get("added_tokens") or ()]
        characters = sum(added) * _growth([spec.get("normalizer")])
        longest = max(_growth([spec.get(name) for name in names]) for names in (TEXT_STEPS, ("decoder",)))
        longest = max(longest, *(len(spec["model"].get(name) or "") for name in AFFIXES))
        around = _ids_around(spec.get("post_processor"))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise InputError(f"{source} does not describe a tokenizer; download it again.") from None
    if longest > LONGEST or around > LONGEST:
        raise InputError(
            f"{source} has more than {MOST_STEPS} steps, or some that make a text over {LONGEST} times longer; get "
            "another file."
        )
    if len(added) > MOST_ADDED or characters > LONGEST_ADDED:
        raise InputError(
            f"{source} has more than {MOST_ADDED:,} added tokens, or {LONGEST_ADDED:,} characters of them; get another "
            "file."
        )


def _growth(steps: list[Any]) -> float:
    """Most characters that the steps can make of one; infinite above `LONGEST` and for more than `MOST_STEPS` steps."""
    growth = 1.0
    for count, step in enumerate(_flat(steps)):
        match step["type"]:
            case "Replace":
                pattern = step["pattern"].get("String") or ""  # a regex may match between any two characters
                growth *= max(1.0, len(step["content"]) / len(pattern) if pattern else len(step["content"]) + 1.0)
            case "Prepend":
                growth += len(step["prepend"])
            case "ByteLevel" | "Precompiled":
                growth *= 4
            case "Metaspace":
                growth += 1
            case "NFD" | "NFKD" | "NFKC":
                growth *= 3
        if growth > LONGEST or count >= MOST_STEPS:
            return math.inf
    return growth


def _flat(steps: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yields the steps in order; a sequence comes before the steps in it."""
    for step in steps:
        if step is not None:
            yield step
            if step["type"] == "Sequence":
                for key in sorted({"normalizers", "pretokenizers", "decoders"} & step.keys()):
                    yield from _flat(step[key])


def _ids_around(step: Any) -> int:
    """Upper bound of the ids that a post-processor writes around a text."""
    if step is None:
        return 0
    if step["type"] == "Sequence":
        return sum(map(_ids_around, step["processors"]), start=1)
    if step["type"] != "TemplateProcessing":
        return 2
    if sum("Sequence" in piece for piece in step["single"]) != 1:
        raise ValueError("the text is written several times")
    written = [piece["SpecialToken"]["id"] for piece in step["single"] if "SpecialToken" in piece]
    return sum(len(step["special_tokens"].get(name, {"ids": ()})["ids"]) for name in written)


PANIC = re.compile(rb"(?:(?<![^\n])\n)?thread '[^\n]*' (?:\(\d+\) )?panicked at .*?(?:\nnote: [^\n]*\n|\Z)", re.DOTALL)
_lock = threading.Lock()
_within = 0  # threads that are in `panics_unprinted`
_kept = -1  # a duplicate of the original file descriptor 2


@functools.cache
def _sink() -> BinaryIO:
    """The temporary file to which file descriptor 2 is redirected."""
    return cast(BinaryIO, tempfile.TemporaryFile(buffering=0))


@contextmanager
def panics_unprinted() -> Iterator[None]:
    """Delay the output on file descriptor 2 until the block ends, and leave out the reports of Rust panics.

    The message of a panic is in the error's sentence instead. The first thread that enters redirects the descriptor and
    the last one that leaves restores it, so no report is printed if several threads panic at once.
    """
    global _within, _kept
    with _lock:
        if not _within:
            _kept = _hold_back()
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if not _within and _kept >= 0:
                _let_go(_kept)


def _hold_back() -> int:
    """Redirect descriptor 2. Returns a duplicate of it; -1 where it is closed or no temporary file can be made."""
    try:
        sink, kept = _sink(), os.dup(2)
    except OSError:
        return -1
    os.dup2(sink.fileno(), 2)
    return kept


def _let_go(kept: int) -> None:
    """Restore descriptor 2 from its duplicate, and write the delayed output without the panic reports."""
    sink = _sink()
    os.dup2(kept, 2)
    os.close(kept)
    if os.fstat(sink.fileno()).st_size:
        sink.seek(0)
        held = PANIC.sub(b"", sink.read())
        sink.seek(0)
        sink.truncate()
        while held:
            held = held[os.write(2, held) :]
