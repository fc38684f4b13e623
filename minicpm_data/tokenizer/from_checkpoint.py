"""The tokenizer that belongs to an opened checkpoint."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_io.checkpoint import Checkpoint
from weights_io.errors import InputError, listed

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer

_noted: set[str] = set()


def tokenizer_of(checkpoint: Checkpoint) -> "Tokenizer | None":
    """From the folder's tokenizer files or the GGUF's metadata; None where there are none.

    Raises `InputError` as `tokenizer_in` does. A note of `check_vocab` is printed on stderr, once.
    """
    tokenizer, note = tokenizer_in(checkpoint.folder, checkpoint.metadata, checkpoint.config.vocab_size)
    if note is not None and note not in _noted:
        _noted.add(note)
        print(f"note: {note}", file=sys.stderr)
    return tokenizer


def tokenizer_in(
    folder: Path, metadata: Mapping[str, Any] | None, vocab_size: int
) -> "tuple[Tokenizer | None, str | None]":
    """The tokenizer of a model folder, or of a GGUF file's ``metadata`` (None for a folder), and a note about it; None
    where there is none.

    Raises `InputError` where it cannot be used, or not with a table of ``vocab_size`` rows.
    """
    from minicpm_data.tokenizer.folder import has_tokenizer, load_tokenizer

    if not has_tokenizer(folder) if metadata is None else not any(key.startswith("tokenizer.") for key in metadata):
        return None, None
    if metadata is None:
        tokenizer = load_tokenizer(folder)
    else:
        from minicpm_data.tokenizer.gguf_tokenizer import tokenizer_from_gguf

        tokenizer = tokenizer_from_gguf(dict(metadata))
    return tokenizer, check_vocab(tokenizer, vocab_size)


def check_vocab(tokenizer: "Tokenizer", vocab_size: int) -> str | None:
    """Whether each id of the tokenizer has one of the ``vocab_size`` rows of a model's table.

    Tokens that were added just behind a table that was not made larger (such as ``[PAD]``) are let pass: the return is
    a note that names them, and from now on the tokenizer refuses texts with them. Raises `InputError` for others.
    """
    if tokenizer.vocab_size <= vocab_size:
        return None
    beyond = tokenizer.added_from(vocab_size)
    ends = {tokenizer.bos_token_id, *tokenizer.eos_token_ids}
    if len(beyond) < tokenizer.vocab_size - vocab_size or not ends.isdisjoint(beyond):
        raise InputError(
            f"wrong tokenizer size: the tokenizer has {tokenizer.vocab_size} ids, and the embedding {vocab_size} rows; "
            "use the tokenizer files that were released with the model."
        )
    tokenizer.rows = vocab_size
    named = listed(map(repr, beyond.values()))
    return f"the tokenizer's added {named} are beyond the model's {vocab_size} rows; texts with them are refused"
