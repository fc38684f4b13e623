"""The mean cross entropy of texts, computed in windows."""

from collections.abc import Iterator, Sequence
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
    mean_loss = backends.module(backend, "training.losses").mean_loss
    encoded = [tokenizer.encode(text) for text in documents]
    rows = [row for ids in encoded for row in windows(ids, length, tokenizer.bos_token_id)]
    total, count = 0.0, 0
    for ids, labels in batches(rows, length, batch_size):
        here = int((labels[:, 1:] != IGNORED).sum())
        total += float(mean_loss(model, ids, labels)) * here
        count += here
    if not count:
        raise InputError("the text of --data has fewer than two tokens; give more text.")
    return {"loss": total / count, "tokens": count}


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
