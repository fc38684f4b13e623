"""The command ``python -m weights_io.fuse``. The tokenizer is built, or refused, before any weight is written."""

from minicpm_data.tokenizer.writing import carried_files
from weights_io.adapters import adapter_folder, read_adapter
from weights_io.checkpoint import open_model
from weights_io.fuse import Options, check_weights, fuse
from weights_io.lora import combined
from weights_io.write import check_output


def main(options: Options) -> None:
    check_output(options.save_path)
    check_weights(options)
    for folder in options.adapter_path:
        adapter_folder(folder)
    checkpoint = open_model(options.model, options.revision, options.hub)
    check_output(options.save_path, checkpoint.path)
    adapters = [read_adapter(folder, checkpoint.config) for folder in options.adapter_path]
    adapter = combined(adapters, options.weights or (1.0,) * len(adapters))
    print("\n".join(fuse(checkpoint, adapter, options, carried_files(checkpoint))))
