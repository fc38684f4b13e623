"""Pretraining data: documents to windows of token ids, and windows to batches in an order that the seed determines."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicpm_data.datasets.examples import LocalRows, ended
from minicpm_data.datasets.formats import Reader
from minicpm_data.datasets.jsonl import read_items
from minicpm_data.datasets.turns import messages_of
from minicpm_data.keys import KeyRules, few
from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer


def pretraining_ids(
    tokenizer: "Tokenizer", document: dict[str, Any], reader: Reader | None = None, trusted: bool = True
) -> list[int]:
    """The token ids of a document in any format, from BOS to EOS. A conversation is rendered with the chat template."""
    found = (reader or Reader()).conversation(document)
    if isinstance(found, str):
        return ended(tokenizer.encode(found, trusted=trusted), tokenizer)
    if any(turn.weight is False for turn in found.turns):
        raise InputError("it has a message that is not to be trained, and pretraining trains all; remove its weight.")
    messages = messages_of(found.turns)
    if any(message.get("reasoning_content") for message in messages):
        tokenizer.features.check_thoughts(messages)
    ids = tokenizer.apply_chat(messages, found.tools, add_generation_prompt=False, trusted=trusted)
    return ended(ids, tokenizer)


def pack(
    path: Path, tokenizer: "Tokenizer", width: int, ignore_keys: Collection[str] = (), trusted: bool = True
) -> np.ndarray:
    """Concatenate the documents of a ``.jsonl`` file and cut them into windows. The last, partial window is dropped.

    Returns:
        [n, width] int32.

    Raises:
        InputError: a line is wrong, or the file does not fill one window.
    """
    rules = KeyRules(ignore_keys)
    ids = read_items(path, lambda document: pretraining_ids(tokenizer, document, Reader(rules), trusted))
    if rules.unused:
        print(f"{path}: not read: {few(rules.unused, '')}")
    flat = np.fromiter((i for document in ids for i in document), np.int32)
    count = len(flat) // width
    if count == 0:
        raise InputError(f"{path} holds {len(flat)} tokens, less than one window of {width}; give more text.")
    return flat[: count * width].reshape(count, width)


class WindowBatches:
    """Endless shuffled batches by number: ``batches[n]`` is [batch_size, width] and depends only on n and the seed.

    Each epoch is shuffled anew.
    """

    def __init__(self, windows: np.ndarray, batch_size: int, seed: int):
        """Raises `InputError` where the windows do not fill one batch."""
        import grain

        if len(windows) < batch_size:
            raise InputError(f"{len(windows)} windows do not fill one batch of {batch_size}; give more text.")
        self._order = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
        self._batch_size = batch_size

    def __getitem__(self, n: int) -> np.ndarray:
        return self.part(n, range)

    def part(self, n: int, local_rows: LocalRows) -> np.ndarray:
        """Batch n with only the ``local_rows``."""
        return np.stack([self._order[n * self._batch_size + row] for row in local_rows(self._batch_size)])
