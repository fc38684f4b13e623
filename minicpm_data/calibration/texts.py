"""The texts of a calibration, as windows of token ids."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from minicpm_data import corpus
from minicpm_data.datasets.jsonl import read_documents
from minicpm_data.tokenizer.tokenizer import Tokenizer
from weights_io.errors import InputError, not_utf8

LONGEST = 1 << 26  # characters of a plain text file that are read


def windows(tokenizer: Tokenizer, data: Path | None, number: int, length: int, seed: int) -> np.ndarray:
    """Windows of the texts, one after the other.

    Arguments:
        tokenizer: of the model.
        data: a text file, or ``.jsonl`` with ``text`` or ``messages`` in each line; None: texts of the built-in corpus.
        number: windows.
        length: tokens of each.
        seed: of the built-in corpus, and of the choice among the windows of a longer text.

    Returns:
        [number, length] int32.

    Raises:
        InputError: the file cannot be read, or its texts are too short.
    """
    needed = 4 * number * length if data is not None else number * length  # of a longer text, windows are drawn
    ids: list[int] = []
    for text in _texts(tokenizer, data, seed):
        ids += tokenizer.encode(text)
        if len(ids) >= needed:
            break
    found = len(ids) // length
    if found < number:
        raise InputError(
            f"{data} has {len(ids):,} tokens, which fill {found} windows of {length}; give more text, or lower "
            "{num_samples} or {max_seq_length}.",
            others=["num_samples", "max_seq_length"],
        )
    rows = np.asarray(ids[: found * length], np.int32).reshape(found, length)
    return rows[sorted(Random(seed).sample(range(found), number))]


def _texts(tokenizer: Tokenizer, data: Path | None, seed: int) -> Iterator[str]:
    if data is None:
        yield from (_text(tokenizer, corpus.document(i, seed, "decay")) for i in count())
    elif data.suffix == ".jsonl":
        for number, line in read_documents(data):
            if not isinstance(line.get("text"), str) and not isinstance(line.get("messages"), list):
                raise InputError(f'{data}, line {number} has neither "text" nor "messages"; give one of them.')
            yield _text(tokenizer, line)
    else:
        try:
            with data.open(encoding="utf-8") as file:
                yield file.read(LONGEST)
        except FileNotFoundError:
            raise InputError(f"{data} does not exist; give a text file, or .jsonl with a text a line.") from None
        except UnicodeDecodeError as error:
            raise not_utf8(data, error) from None


def _text(tokenizer: Tokenizer, document: dict[str, Any]) -> str:
    if isinstance(document.get("text"), str):
        return document["text"]
    return tokenizer.render_chat(document["messages"], add_generation_prompt=False)
