"""The command ``python -m weights_io.convert``. The tokenizer is built, or refused, before any weight is written."""

from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
from minicpm_data.tokenizer.gguf_writing import metadata_of
from minicpm_data.tokenizer.modelfile import modelfile
from minicpm_data.tokenizer.writing import carried_files
from weights_io.checkpoint import Checkpoint, open_model
from weights_io.convert import Options, check, convert, convert_to_gguf
from weights_io.errors import InputError
from weights_io.files.gguf_writing import check_config
from weights_io.write import check_output


def main(options: Options) -> None:
    check(options)
    if options.to != "gguf":
        check_output(options.save_path)
    checkpoint = open_model(options.model, options.revision, options.hub)
    if options.to != "gguf":
        check_output(options.save_path, checkpoint.path)
    print("\n".join(converted(checkpoint, options)))


def converted(checkpoint: Checkpoint, options: Options) -> list[str]:
    """Write the converted model with its tokenizer.

    Arguments:
        checkpoint: the model to convert.
        options: as on the command line.

    Returns:
        Lines for the user.

    Raises:
        InputError: the model or its tokenizer has no place in the format, or the output cannot be written.
    """
    if options.to != "gguf":
        return convert(checkpoint, options, carried_files(checkpoint))
    check_config(checkpoint.config)
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is None:
        raise InputError(f"{checkpoint.path} has no tokenizer, without which llama.cpp loads no model; add its files.")
    written = modelfile(tokenizer, options.save_path.name) if options.modelfile else None
    metadata = metadata_of(tokenizer, checkpoint.config.vocab_size)
    return convert_to_gguf(checkpoint, options, metadata, written)
