"""The command ``python -m weights_io.convert``. The tokenizer is built, or refused, before any weight is written."""

from minicpm_data.tokenizer.writing import carried_files
from weights_io.checkpoint import open_model
from weights_io.convert import Options, check, convert
from weights_io.write import check_output


def main(options: Options) -> None:
    check(options)
    check_output(options.save_path)
    checkpoint = open_model(options.model, options.revision, options.hub)
    check_output(options.save_path, checkpoint.path)
    print("\n".join(convert(checkpoint, options, carried_files(checkpoint))))
