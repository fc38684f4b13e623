"""The command ``python -m minicpm_jax.quantize`` or ``minicpm_mlx.quantize``: the same but for the backend."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.calibration.inputs import LayerRunner


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str | None = None
    """Model folder, GGUF file, hub id (owner/name, owner/name/folder) or short name; default: the built-in model."""
    method: Literal["gptq", "awq"]
    """How the codes are chosen, and the format that is written. gptq: symmetric, later columns make up for the rounding
    of earlier ones; awq: with zero points, inputs that matter are scaled up before rounding."""
    save_path: Path
    """Folder to write. It must be empty or not exist yet. Until the end, finished layers are kept in
    SAVE_PATH.calibrating, and the same command goes on from them."""
    data: Path | None = None
    """Calibration texts: a text file, or .jsonl with "text" or "messages" in each line. They should resemble what the
    model is used for. By default texts of the built-in corpus, which are short and simple."""
    q_bits: Literal[2, 3, 4, 8] = 4
    """Bits of each weight. awq: 4."""
    q_group_size: Literal[32, 64, 128] = 128
    """Group size, the number of weights of a row that share a scale."""
    num_samples: int = 128
    """Number of windows of the texts."""
    max_seq_length: int = 512
    """Tokens of a window."""
    seed: int = 0
    """Seed of the choice of windows, and of the built-in corpus."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where --model is downloaded from if it is not on this disk."""
    trust_remote_code: Annotated[bool, tyro.conf.Suppress] = False
    """Accepted for scripts of mlx_lm; it changes nothing, as no code of a checkpoint is run."""


def quantize(options: Options, runner: Callable[[], "LayerRunner"]) -> None:
    """Quantize a model with calibration texts, and write it as a GPTQ or AWQ folder.

    Arguments:
        options: the flags.
        runner: gives what runs the layers in a backend; called after the options and the model were checked.

    Raises:
        InputError: an option, the model, the texts or the output cannot be used.
    """
    from minicpm_data.calibration.run import UNFINISHED, Calibration
    from minicpm_data.calibration.texts import windows
    from minicpm_data.option_checks import check_range
    from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
    from minicpm_data.tokenizer.writing import carried_files
    from weights_io.casting import Rounding
    from weights_io.checkpoint import open_model
    from weights_io.convert import write_model
    from weights_io.progress import waiting
    from weights_io.write import check_output

    check_range(options, "num_samples", "max_seq_length", least=1)
    check_output(options.save_path)
    checkpoint = open_model(options.model, options.revision, options.hub)
    out = check_output(options.save_path, checkpoint.path)
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is None:
        raise InputError(f"{options.model} has no tokenizer, and calibration needs texts; add its files.")
    length = min(options.max_seq_length, checkpoint.config.max_position_embeddings)
    with waiting("reading the calibration texts"):
        ids = windows(tokenizer, options.data, options.num_samples, length, options.seed)
    settings = {
        name: str(getattr(options, name)) for name in ("model", "method", "data", "q_bits", "q_group_size", "seed")
    }
    settings |= {"num_samples": str(options.num_samples), "length": str(length)}
    work = out.with_name(out.name + UNFINISHED)
    calibration = Calibration(
        checkpoint, runner(), options.method, options.q_bits, options.q_group_size, work, settings
    )
    errors = calibration.run(ids)
    print(f"calibrated on {ids.size:,} tokens; error of each layer's update:")
    for number, error in enumerate(errors):
        print(f"  layer {number:3} {error:.2%}")
    files, packing = carried_files(checkpoint), calibration.packing()
    lines = write_model(
        out, checkpoint, checkpoint.config, calibration.tensors(), "float16", Rounding(), files, packing=packing
    )
    calibration.remove()
    print("\n".join(lines))
