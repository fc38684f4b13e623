"""Convert a SentencePiece BPE vocabulary to a fast tokenizer, from a ``tokenizer.model`` or a GGUF file's lists."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights_io.errors import InputError, short
from weights_io.files.json_text import MAX_BYTES
from weights_io.files.regular import read_regular

# Piece types of sentencepiece_model.proto; GGUF's tokenizer.ggml.token_type uses the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # how a SentencePiece vocabulary writes a space
BPE_MODEL = 2  # TrainerSpec.ModelType
LONGEST_PIECE = 512  # characters; the time for a piece's merges grows with its length squared
VARINT_BYTES = 10  # most bytes of a 64-bit number


@dataclass(frozen=True)
class SpmModel:
    """A SentencePiece vocabulary. Index ``i`` of the three lists is token id ``i``."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    add_dummy_prefix: bool = True
    unk_id: int | None = 0
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = None


def read_spm(path: Path) -> SpmModel:
    """Read a ``tokenizer.model``.

    Arguments:
        path: the file.

    Returns:
        The vocabulary.

    Raises:
        InputError: the file is truncated, or is not a SentencePiece BPE model.
    """
    pieces, scores, types = [], [], []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    data = read_regular(path, MAX_BYTES)
    try:
        for field, value in _fields(data):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
                types.append(piece.get(3, NORMAL))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normalizer = dict(_fields(value))
        # Field numbers and defaults of TrainerSpec. Ids are int32; -1 means none and is stored as ten bytes.
        special = [trainer.get(field, default) & 0xFFFFFFFF for field, default in ((40, 0), (41, 1), (42, 2), (43, -1))]
    except (ValueError, LookupError, TypeError, AttributeError, struct.error):
        trainer = {}
    if not pieces or not trainer:  # the trainer's settings come after the last piece
        raise InputError(f"{path} is not a SentencePiece model, or is cut short; download it again.")
    if trainer.get(3, 1) != BPE_MODEL:
        raise InputError(f"{path} is not a BPE model; only SentencePiece BPE vocabularies are supported.")
    unk, bos, eos, pad = (None if i >= len(pieces) else i for i in special)
    return SpmModel(pieces, scores, types, bool(normalizer.get(3, True)), unk, bos, eos, pad)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of each field of a protobuf message. A varint is an int, any other value is bytes.

    Raises `ValueError` or `IndexError` where the message is truncated.
    """
    at, end = 0, len(data)

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 7 * VARINT_BYTES, 7):
            byte = data[at]  # IndexError past the end
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number of more than 64 bits")

    while at < end:
        key = varint()
        match key & 7:
            case 0:
                yield key >> 3, varint()
                continue
            case 1:
                size = 8
            case 2:
                size = varint()
            case 5:
                size = 4
            case wire_type:
                raise ValueError(f"wire type {wire_type}")
        if at + size > end:
            raise ValueError("cut short")
        yield key >> 3, data[at : at + size]
        at += size


def bpe_merges(pieces: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merge list that a piece list implies, best first.

    Each split of a piece into two other pieces is a merge. Merges are sorted by the score of the piece that they make.
    Pieces of equal score are sorted by id, and the splits of one piece by the ids of their parts. The
    ``tokenizer.json`` files that OpenBMB released have this order; they were made from the ``tokenizer.model`` files in
    the same folders.

    Raises `InputError` where a piece is longer than `LONGEST_PIECE`.
    """
    ids = {piece: i for i, piece in enumerate(pieces)}
    if (longest := max(map(len, pieces), default=0)) > LONGEST_PIECE:
        raise InputError(f"the vocabulary has a piece of {longest:,} characters; get the tokenizer files again.")
    merges = []
    for i in sorted(range(len(pieces)), key=lambda i: -scores[i]):
        piece = pieces[i]
        splits = ((piece[:n], piece[n:]) for n in range(1, len(piece)))
        found = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def fast_spec(
    model: SpmModel,
    space_prefix: bool,
    added: dict[int, dict] | None = None,
    legacy: bool = True,
    add_prefix_space: bool = True,
) -> dict:
    """Convert a SentencePiece vocabulary to the contents of a ``tokenizer.json``.

    Arguments:
        model: the vocabulary.
        space_prefix: True follows transformers' fast Llama tokenizer, with which MiniCPM's text models were tuned.
            Every stretch of text between special tokens gets a leading "▁", whatever ``add_dummy_prefix`` says.
            Decoding drops one leading space. User-defined pieces result from merges only.
            False follows SentencePiece itself. A text gets no leading "▁". User-defined pieces, and pieces that only
            SentencePiece can merge, are split off the text first.
        added: more added tokens by id, each ``{"content": str, "special": bool, ...}``. A token with the id of a piece
            renames the piece.
        legacy: False follows the fast Llama tokenizer with ``legacy`` false: only the start of a text gets a "▁",
            unless it starts with a space.
        add_prefix_space: False follows the fast Llama tokenizer with ``add_prefix_space`` false: no leading "▁".

    Returns:
        The contents of the file, as JSON values.

    Raises:
        InputError: a piece is longer than `LONGEST_PIECE`, or a token is listed twice.
    """
    pieces = list(model.pieces)
    tokens = {i: added_token(i, pieces[i], True) for i, kind in enumerate(model.types) if kind in (UNKNOWN, CONTROL)}
    if not space_prefix:
        cut = [i for i, kind in enumerate(model.types) if kind == USER_DEFINED] + _beyond_merges(model)
        tokens |= {i: added_token(i, pieces[i], False) for i in cut}
    for i, token in sorted((added or {}).items()):
        tokens[i] = added_token(**{"special": False, **token, "id": i})
        if i < len(pieces):
            pieces[i] = token["content"]

    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefixed = space_prefix and add_prefix_space
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
    scheme = "first" if prefixed else "never"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "added_tokens": [tokens[i] for i in sorted(tokens)],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, spaces]} if legacy else None,
        "pre_tokenizer": None if legacy else metaspace,
        "post_processor": None if model.bos_id is None else _bos_first(pieces[model.bos_id], model.bos_id),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": None if model.unk_id is None else pieces[model.unk_id],
            "fuse_unk": True,
            "byte_fallback": BYTE in model.types,
            "vocab": unique_ids(pieces),
            "merges": bpe_merges(pieces, model.scores),
        },
    }


def _beyond_merges(model: SpmModel) -> list[int]:
    """Ids of pieces that SentencePiece merges from characters that are not pieces, such as an emoji and a skin tone."""
    ids = {piece: i for i, piece in enumerate(model.pieces)}
    merged = {left + right for left, right in bpe_merges(model.pieces, model.scores)}
    made = set(merged)
    for piece in sorted(ids, key=len):
        if model.types[ids[piece]] == NORMAL and piece not in merged:
            parts = ((piece[:n], piece[n:]) for n in range(1, len(piece)))
            if any(all(len(part) == 1 or part in made for part in pair) for pair in parts):
                made.add(piece)
    return [ids[piece] for piece in made - merged]


def _bos_first(bos: str, bos_id: int) -> dict:
    """The post-processor that adds BOS before each text."""

    def part(name: str, type_id: int) -> list[dict]:
        return [{"SpecialToken": {"id": bos, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": [*part("A", 0), *part("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def added_token(
    id: int,
    content: str,
    special: bool,
    lstrip: bool = False,
    rstrip: bool = False,
    single_word: bool = False,
    normalized: bool = False,
    **_,
) -> dict:
    """One entry of ``added_tokens`` in a ``tokenizer.json``. Other keys are ignored."""
    flags = {"lstrip": lstrip, "rstrip": rstrip, "single_word": single_word, "normalized": normalized}
    return {"id": id, "content": content, "special": special, **flags}


def unique_ids(tokens: Sequence[str]) -> dict[str, int]:
    """Token -> id. Raises `InputError` where a token has two ids."""
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise InputError(f"the vocabulary lists the token {short(twice)!r} twice; get the tokenizer files again.")
    return ids
