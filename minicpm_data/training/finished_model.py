"""Write the finished model of a run in Hugging Face layout, replacing an earlier one in the run's folder."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minicpm_data.training.options import FullOptions, PretrainOptions
from minicpm_data.training.run_folder import replace_model

if TYPE_CHECKING:
    from weights_io.checkpoint import Checkpoint
    from weights_io.config import ModelConfig


def export_finetuned(options: FullOptions, source: "Checkpoint", tensors: Mapping[str, Any]) -> None:
    """Write a fine-tuned model, with the tokenizer and config keys of ``source``, the checkpoint it started from."""
    from minicpm_data.tokenizer.writing import carried_files
    from weights_io.casting import Rounding
    from weights_io.convert import write_model

    how = source.config, tensors, options.save_dtype or source.dtype, Rounding(), carried_files(source)
    replace_model(options.out, lambda new: write_model(new, source, *how))


def export_pretrained(
    options: PretrainOptions, config: "ModelConfig", raw_config: Mapping[str, Any], tensors: Mapping[str, Any]
) -> None:
    """Write a pretrained model, with the run's tokenizer."""
    from weights_io.write import save_checkpoint

    further: dict[str, Any] = {"raw_config": raw_config, "copy_from": options.tokenizer, "dtype": options.save_dtype}
    replace_model(options.out, lambda new: save_checkpoint(new, config, tensors, **further))
