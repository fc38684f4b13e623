"""Documents to full windows of token ids, and windows to batches in an order that a step number alone decides."""

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
    """Token ids of a text or a conversation of any form, from BOS to EOS; chat is text in the chat format."""
    turns = (reader or Reader()).conversation(document)
    if isinstance(turns, str):
        return ended(tokenizer.encode(turns, trusted=trusted), tokenizer)
    if any(turn.weight is False for turn in turns):
        raise InputError("it has a message that is not to be trained, and pretraining trains all; remove its weight.")
    ids = tokenizer.apply_chat(messages_of(turns), add_generation_prompt=False, trusted=trusted)
    return ended(ids, tokenizer)


def pack(
    path: Path, tokenizer: "Tokenizer", width: int, ignore_keys: Collection[str] = (), trusted: bool = True
) -> np.ndarray:
    """All documents of a ``.jsonl`` file, one after the other, cut into windows: [n, width] int32. The last, partial
    window is dropped."""
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
    """Endless shuffled batches, addressed by number: ``batches[17]`` is [batch_size, width] whatever came before, so a
    resumed run needs no more than its step. Each pass over the windows has an order of its own."""

    def __init__(self, windows: np.ndarray, batch_size: int, seed: int):
        """InputError where the windows do not fill a batch."""
        import grain

        if len(windows) < batch_size:
            raise InputError(f"{len(windows)} windows do not fill one batch of {batch_size}; give more text.")
        self._order = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
        self._batch_size = batch_size

    def __getitem__(self, n: int) -> np.ndarray:
        return self.part(n, range)

    def part(self, n: int, local_rows: LocalRows) -> np.ndarray:
        """Of batch n only the ``local_rows`` rows."""
        return np.stack([self._order[n * self._batch_size + row] for row in local_rows(self._batch_size)])
