"""Load the tokenizer of an open checkpoint."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_data.conversation.regions import REGION_TAGS
from minicpm_data.sampling_defaults import chat_sampling
from minicpm_data.tokenizer.chat_template import MINICPM_V_TEMPLATE, OMNILMM_TEMPLATE
from weights_io.checkpoint import Checkpoint
from weights_io.errors import InputError, listed

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer

_noted: set[str] = set()


def tokenizer_of(checkpoint: Checkpoint) -> "Tokenizer | None":
    """Load the tokenizer from a folder's files or a GGUF file's metadata.

    A note of `check_vocab` is printed on stderr, once.

    Arguments:
        checkpoint: the open checkpoint.

    Returns:
        The tokenizer; None where the checkpoint has none.

    Raises:
        InputError: as `tokenizer_in` and `chat_sampling`.
    """
    tokenizer, note = tokenizer_in(checkpoint.folder, checkpoint.metadata, checkpoint.config.vocab_size)
    if tokenizer is not None:
        if checkpoint.config.vision is not None:
            tokenizer.treat_as_text(REGION_TAGS)
        if checkpoint.config.vision is not None and not tokenizer.chat_template_given:
            omnilmm = checkpoint.config.vision.variant == "omnilmm"
            tokenizer.chat_template = OMNILMM_TEMPLATE if omnilmm else MINICPM_V_TEMPLATE
        folder = checkpoint.folder if checkpoint.metadata is None else None
        tokenizer.sampling = chat_sampling(asdict(checkpoint.config), tokenizer.chat_template, folder)
    if note is not None and note not in _noted:
        _noted.add(note)
        print(f"note: {note}", file=sys.stderr)
    return tokenizer


def tokenizer_in(
    folder: Path, metadata: Mapping[str, Any] | None, vocab_size: int
) -> "tuple[Tokenizer | None, str | None]":
    """Load a tokenizer and check it against the model.

    Arguments:
        folder: the model folder.
        metadata: the metadata of a GGUF file; None for a folder.
        vocab_size: rows of the model's embedding.

    Returns:
        The tokenizer and a note for the user; each is None if there is none.

    Raises:
        InputError: the tokenizer cannot be used, or does not fit the embedding.
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
    """Check that every id of a tokenizer has a row in the model's embedding.

    Some checkpoints add tokens such as ``[PAD]`` without enlarging the embedding. They are accepted, and from then on
    the tokenizer refuses texts that contain these tokens.

    Arguments:
        tokenizer: its ``rows`` is set if it has such tokens.
        vocab_size: rows of the model's embedding.

    Returns:
        A note that names such tokens; None where all ids have a row.

    Raises:
        InputError: ids that are not such added tokens are beyond the embedding.
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
