"""The cross entropy of texts, computed in windows: the mean, and the perplexity of samples as in mlx_lm."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_data.datasets.examples import IGNORED
from minicpm_serve import backends
from weights_io.errors import InputError, not_utf8

if TYPE_CHECKING:
    import numpy as np

    from minicpm_data.tokenizer.tokenizer import Tokenizer


def loss_of(
    backend: backends.BackendName,
    model: Any,
    tokenizer: "Tokenizer",
    documents: Sequence[str],
    length: int,
    batch_size: int,
) -> dict[str, Any]:
    """The loss of a model on texts.

    Arguments:
        backend: ``jax`` or ``mlx``.
        model, tokenizer: as ``load`` returns them.
        documents: the texts.
        length: tokens per window.
        batch_size: windows per batch.

    Returns:
        ``loss``, the mean cross entropy in nats per predicted token, and ``tokens``, the number of predicted tokens.

    Raises:
        InputError: the texts have fewer than two tokens.
    """
    encoded = [tokenizer.encode(text) for text in documents]
    rows = [row for ids in encoded for row in windows(ids, length, tokenizer.bos_token_id)]
    losses = token_losses(backend, model, rows, length, batch_size)
    if not losses.size:
        raise InputError("the text of --data has fewer than two tokens; give more text.")
    return {"loss": float(losses.mean()), "tokens": losses.size}


def token_losses(
    backend: backends.BackendName, model: Any, rows: Sequence[list[int]], width: int, batch_size: int
) -> "np.ndarray":
    """The cross entropy of every token of the rows that has one before it, in nats.

    Arguments:
        backend, model, batch_size: as in `loss_of`.
        rows: token ids, at most ``width`` each.

    Returns:
        [N] float64, row by row.
    """
    import numpy as np
    from tqdm import tqdm

    label_losses = backends.module(backend, "training.losses").label_losses
    found = [np.empty(0)]
    with tqdm(total=len(rows), desc="windows", disable=None, delay=1) as bar:
        for ids, labels in batches(rows, width, batch_size):
            losses = np.asarray(label_losses(model, ids, labels), np.float64)
            found.append(losses[:, 1:][labels[:, 1:] != IGNORED])
            bar.update(min(batch_size, len(rows) - bar.n))
    return np.concatenate(found)


@dataclass(frozen=True)
class Perplexity:
    """exp(mean cross entropy), and the standard error that the number of tokens leaves it."""

    value: float
    error: float

    @classmethod
    def of(cls, losses: "np.ndarray") -> "Perplexity":
        """Of token losses [N] in nats. The error of the mean becomes that of the exponential, as in mlx_lm."""
        value = math.exp(min(float(losses.mean()), 700))  # e^709 is the largest float
        spread = float(losses.std(ddof=1)) if losses.size > 1 else 0.0
        return cls(value, value * spread / math.sqrt(losses.size))


def samples(encoded: Sequence[Sequence[int]], width: int, most: int, seed: int) -> list[list[int]]:
    """Rows of ``width`` tokens: the documents in random order, one after the other, as mlx_lm cuts them.

    Arguments:
        encoded: token ids of each document.
        width: tokens of a row.
        most: largest number of rows; -1 takes all.
        seed: of the order.

    Returns:
        The rows. Where the documents do not fill one, all they hold is one shorter row.
    """
    import numpy as np

    tokens: list[int] = []
    for at in np.random.RandomState(seed).permutation(len(encoded)):
        if 0 <= most * width <= len(tokens):
            break
        tokens += encoded[at]
    if len(tokens) < width:
        return [tokens]
    rows = [tokens[start : start + width] for start in range(0, len(tokens) - width + 1, width)]
    return rows[: most if most >= 0 else None]


def windows(ids: Sequence[int], width: int, bos_token_id: int | None) -> Iterator[list[int]]:
    """Cut a document into windows of at most ``width`` tokens, so that each token is predicted once.

    A window starts with BOS if the document does, else with the preceding token.
    """
    for start in range(1, len(ids), width - 1):
        first = ids[0] if ids[0] == bos_token_id else ids[start - 1]
        yield [first, *ids[start : start + width - 1]]


def batches(rows: Sequence[list[int]], width: int, size: int) -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """Ids and labels, [size, width] int32 each. All batches have one shape and are padded with ignored tokens."""
    import numpy as np

    for start in range(0, len(rows), size):
        ids, labels = np.zeros((size, width), np.int32), np.full((size, width), IGNORED, np.int32)
        for place, row in enumerate(rows[start : start + size]):
            ids[place, : len(row)] = labels[place, : len(row)] = row
        yield ids, labels


def read_texts(path: Path) -> list[str]:
    """The documents of a ``.jsonl`` file, or a text file as one document. Raises `InputError` for other files."""
    from minicpm_data.datasets.formats import Reader
    from minicpm_data.datasets.jsonl import read_items

    def text(document: dict[str, Any]) -> str:
        found = Reader().conversation(document)
        if not isinstance(found, str):
            raise InputError('it has no "text"; give only texts.')
        return found

    if path.suffix == ".jsonl":
        return read_items(path, text)
    try:
        return [path.read_text(encoding="utf-8")]
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a text file, or .jsonl with a text a line.") from None
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
