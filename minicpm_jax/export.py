"""Export a checkpoint of a training run as a model, in Hugging Face layout or in a format of `weights_io.convert`.

    python -m minicpm_jax.export --checkpoint finetuned --step 500 --save-path model-500

``--checkpoint`` is the folder of a run of minicpm_jax.finetune or minicpm_jax.pretrain. The run may be finished or
interrupted, and may have used one host or several. One parameter at a time is in memory. No accelerator is needed.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from minicpm_data.training.checkpoint_folder import CheckpointFolder
from weights_io import command_line
from weights_io.command_line import Former
from weights_io.errors import InputError, listed
from weights_io.files.gguf_writing import OutType
from weights_io.progress import waiting

if TYPE_CHECKING:
    from weights_io.checkpoint import Checkpoint


@dataclass(frozen=True)
class Options:
    checkpoint: Path
    """Folder of the run, or of one of its checkpoints (RUN/checkpoints/STEP)."""
    save_path: Annotated[Path, Former("out")]
    """Folder to write. It must be empty or not exist yet. With --to gguf: the file to write, NAME.gguf."""
    step: int | None = None
    """Step of the checkpoint. By default the last one."""
    to: Literal["hf", "llama", "mlx", "gguf"] = "hf"
    """Format, as in convert. hf: the model's own architecture; llama: LlamaForCausalLM; mlx: for mlx_lm; gguf: a file
    for llama.cpp."""
    outtype: OutType | None = None
    """With --to gguf: type of the matrices, as in convert; f16 by default."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the written weights. By default the dtype that the run itself writes at its end."""
    source: str | None = None
    """New place of the base model (or, after pretraining, of the tokenizer), if it was moved since the run."""


def main(options: Options) -> None:
    """Write a checkpoint of a training run as a Hugging Face folder."""
    from minicpm_data.cli.convert import converted
    from weights_io import convert
    from weights_io.files.json_text import read_json
    from weights_io.write import check_output

    how = convert.Options("", options.to, options.save_path, options.dtype, outtype=options.outtype)
    convert.check(how)
    run, step = find(options.checkpoint, options.step)
    if options.to != "gguf":
        check_output(options.save_path, run)
    settings = read_json(run / "settings.json")
    pretraining = "config" in settings  # earlier versions wrote no backend there, as MLX had no pretraining
    if settings.get("backend", "minicpm_jax" if pretraining else None) != "minicpm_jax":
        raise InputError(
            f"{run} is a run of MLX, whose checkpoints this command does not read; a finished run holds its model or "
            "adapter, and --resume finishes an interrupted one."
        )
    if "rank" in settings:
        raise InputError(f"{run} is a run of adapters; python -m minicpm_jax.fuse works them into their model.")
    if (options.source or "").endswith(".gguf") and pretraining:
        raise InputError("is a GGUF file; give the folder of the run's tokenizer.", option="source")

    with waiting("starting JAX"):
        import jax

        from minicpm_jax.training.run_checkpoints import Saved, check

    jax.config.update("jax_platforms", "cpu")  # the run itself may still use the accelerator
    start = (pretrained if pretraining else finetuned)(settings, options.source)
    notes = settings.get("notes", {})
    check(run / "checkpoints", step)
    tensors: Any = Saved(run / "checkpoints", step).tensors(start.config)
    checkpoint = dataclasses.replace(start, tensors=tensors)
    dtype: Any = options.dtype or notes.get("save_dtype") or start.dtype
    print(f"step {step} of {run}")
    how = dataclasses.replace(how, model=str(run), dtype=dtype)
    print("\n".join(converted(checkpoint, how)))


def find(folder: Path, step: int | None) -> tuple[Path, int]:
    """The run's folder, and the step of the checkpoint to export. Raises `InputError` if there is none."""
    if folder.parent.name == "checkpoints" and folder.name.isdecimal():
        if step not in (None, int(folder.name)):
            raise InputError(
                f"{folder} is that of step {folder.name}, and --step is {step}; give one.", option="checkpoint"
            )
        folder, step = folder.parent.parent, int(folder.name)
    if not (folder / "settings.json").is_file():
        raise InputError(f"{folder} is no training run: it has no settings.json; give its --save-path.")
    there = CheckpointFolder(folder / "checkpoints").steps
    if not there:
        raise InputError(f"{folder} holds no checkpoint yet.")
    if step is not None and step not in there:
        raise InputError(f"{folder} holds no checkpoint of step {step}; there are {listed(there)}.")
    return folder, there[-1] if step is None else step


def pretrained(settings: Mapping[str, Any], source: str | None) -> "Checkpoint":
    """The checkpoint that a pretraining run started from; its tokenizer is in ``source``."""
    from weights_io.checkpoint import Checkpoint
    from weights_io.config import ModelConfig

    notes = settings.get("notes", {})
    raw, folder = notes.get("config.json", settings["config"]), source or notes.get("tokenizer")
    if folder is None or not Path(folder).is_dir():
        raise InputError(f"the run's tokenizer is not at {folder} any more; say with --source where it is.")
    config = ModelConfig.from_dict(settings["config"], "settings.json")
    return Checkpoint(Path(folder), raw, config, {}, "bfloat16", (), ())


def finetuned(settings: Mapping[str, Any], source: str | None) -> "Checkpoint":
    """The base model of a fine-tuning run, from ``source`` or from where the run read it."""
    from weights_io.checkpoint import open_model

    notes = settings.get("notes", {})
    model = source or notes.get("source", settings["model"])
    hub = notes.get("hub", "huggingface")
    return open_model(model, None if source else settings["revision"], hub)


if __name__ == "__main__":
    command_line.run(main, Options, "python -m minicpm_jax.export")
