"""The tokenizer that belongs to an opened checkpoint."""

from weights_io.checkpoint import Checkpoint


def tokenizer_of(checkpoint: Checkpoint):
    """From the folder's tokenizer files or the GGUF's metadata; None where there are none.

    Raises `InputError` where the tokenizer has ids that the embedding has no row for.
    """
    from minicpm_data.tokenizer import check_vocab, has_tokenizer, load_tokenizer

    if checkpoint.metadata is not None:
        from minicpm_data.gguf_tokenizer import tokenizer_from_gguf

        tokenizer = tokenizer_from_gguf(dict(checkpoint.metadata))
    elif has_tokenizer(checkpoint.folder):
        tokenizer = load_tokenizer(checkpoint.folder)
    else:
        return None
    check_vocab(tokenizer, checkpoint.config.vocab_size)
    return tokenizer
