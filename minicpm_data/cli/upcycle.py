"""The command ``python -m weights_io.upcycle``. The tokenizer is built, or refused, before any weight is written."""

from minicpm_data.tokenizer.writing import carried_files
from weights_io.casting import Rounding
from weights_io.checkpoint import open_model
from weights_io.convert import write_model
from weights_io.parameters import count_active
from weights_io.upcycle import Options, upcycled
from weights_io.write import check_output


def main(options: Options) -> None:
    check_output(options.save_path)
    checkpoint = open_model(options.model, options.revision, options.hub)
    check_output(options.save_path, checkpoint.path)
    config, tensors = upcycled(checkpoint, options.num_experts, options.num_experts_per_tok, options.seed)
    files = carried_files(checkpoint)
    lines = write_model(options.save_path, checkpoint, config, tensors, options.dtype, Rounding(), files)
    print("\n".join([*lines, f"{count_active(config):,} parameters are used for each token"]))
