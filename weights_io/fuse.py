"""Fuse adapters into the weights of their model, and write the result as a Hugging Face folder.

    python -m weights_io.fuse --model openbmb/MiniCPM-2B-sft-bf16 --adapter-path adapters --save-path fused_model

An adapter is in the format of PEFT or mlx_lm. Several are added up, each with its weight. The weights of the model are
computed in float32 and written unquantized, one tensor at a time. Needs neither JAX nor MLX.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from weights_io.casting import Rounding
from weights_io.checkpoint import Checkpoint
from weights_io.command_line import Former, Unneeded
from weights_io.config import DTYPES
from weights_io.errors import InputError
from weights_io.lora import Adapter, UpdateStats
from weights_io.progress import waiting
from weights_io.write import Tensor

BLOCK = 32  # values of a row that share a scale in most GGUF types


@dataclass(frozen=True)
class Options:
    model: str | None = None
    """Model folder, GGUF file, hub id (owner/name) or short name from the catalogue (default: the built-in model)."""
    adapter_path: tuple[Path, ...] = (Path("adapters"),)
    """Folder of the adapter, in the format of PEFT or mlx_lm; or folders of several, which are added up."""
    weights: tuple[float, ...] = ()
    """With several adapters: factor of each, such as 0.7 0.3. By default each counts fully."""
    save_path: Path = Path("fused_model")
    """Folder to write. It must be empty or not exist yet."""
    to: Literal["hf", "llama"] = "hf"
    """hf: the model's own architecture; llama: LlamaForCausalLM, with MiniCPM's scales folded in."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the written weights. By default each tensor keeps its own (--to llama: the checkpoint's dtype)."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where --model is downloaded from if it is not on this disk."""
    dequantize: Annotated[bool, Former("de_quantize")] = False
    """Write the weights of a quantized model in that model's dtype, as mlx_lm does. By default they become float32."""
    trust_remote_code: Annotated[bool, tyro.conf.Suppress, Unneeded("no code of a checkpoint is run")] = False
    """Accepted for scripts of mlx_lm; it changes nothing, as no code of a checkpoint is run."""


def main(options: Options) -> None:
    """Fuse adapters into the weights of their model and write the result as a Hugging Face folder."""
    from weights_io.command_line import command_above

    command_above("fuse")(options)


def fuse(checkpoint: Checkpoint, adapter: Adapter, options: Options, tokenizer_files: Mapping[str, str]) -> list[str]:
    """Write the fused model to ``options.save_path``.

    Arguments:
        checkpoint: the base model.
        adapter: its adapter.
        options: as on the command line.
        tokenizer_files: as in `convert.write_model`.

    Returns:
        Lines for the user: the files, the size of the adapter's update and the rounding errors.

    Raises:
        InputError: as `weights_io.write.save_checkpoint`.
    """
    from weights_io.adapters import fuse_adapter, summary
    from weights_io.convert import write_model
    from weights_io.llama_format import to_llama

    rounding, change = Rounding(), UpdateStats()
    config = checkpoint.config
    dtype: str | None = options.dtype
    tensors: Mapping[str, Tensor]
    lines = []
    if options.dequantize and quantized_kinds(checkpoint):
        dtype = dtype or checkpoint.dtype
    elif options.dequantize:
        lines.append(f"{checkpoint.path.name} is not quantized, so --dequantize changes nothing")
    if options.to == "llama":
        dtype = dtype or checkpoint.dtype
        config, tensors = to_llama(config, fuse_adapter(checkpoint, adapter, "float32", change=change), dtype, rounding)
    else:
        tensors = fuse_adapter(checkpoint, adapter, dtype, rounding, change)
    lines.append(f"adapter: {summary(adapter)}")
    lines += write_model(options.save_path, checkpoint, config, tensors, dtype, rounding, tokenizer_files)
    line = f"the adapter changes its weights by {change.size:.2g} of their size (root mean square)"
    if change.lost:
        line += f", and rounding is {change.error:.2g} of that change"
    lines.append(line)
    if kinds := quantized_kinds(checkpoint):
        with waiting("estimating the error of the quantized blocks"):
            error = quantization_error(checkpoint)
        lines.append(
            f"{checkpoint.path.name} is quantized ({', '.join(kinds)}): the fused weights carry that error, by the "
            f"steps of its blocks about {error:.2g} of their size (root mean square); fuse "
            "into the unquantized model where there is a choice"
        )
    return lines


def check_weights(options: Options) -> None:
    """Raises `InputError` unless there are no weights, or as many as adapters."""
    if options.weights and len(options.weights) != len(options.adapter_path):
        raise InputError(
            f"has {len(options.weights)} numbers for {len(options.adapter_path)} of {{adapter_path}}; give one each.",
            "weights",
            ["adapter_path"],
        )
    if wrong := [weight for weight in options.weights if not math.isfinite(weight)]:
        raise InputError(f"holds {wrong[0]}; give finite numbers.", "weights")
    if len(set(options.adapter_path)) < len(options.adapter_path):
        raise InputError("names a folder twice; give each once, with its weight.", "adapter_path")


def quantized_kinds(checkpoint: Checkpoint) -> list[str]:
    """The block types (``Q4_K``) of a GGUF file's quantized tensors; empty for unquantized weights."""
    return sorted(set(_kinds(checkpoint).values()))


def quantization_error(checkpoint: Checkpoint) -> float:
    """The quantization error of the weights relative to the weights (root mean square), from `step_error`."""
    squares = errors = 0.0
    for name, kind in _kinds(checkpoint).items():
        tensor = checkpoint.tensors[name]
        weights = tensor.read()
        errors += step_error(weights, kind, getattr(tensor, "group_size", BLOCK))
        squares += float(np.sum(weights**2, dtype=np.float64))
    return math.sqrt(errors / squares)


def step_error(weights: np.ndarray, kind: str, block: int = BLOCK) -> float:
    """Estimate the summed squared quantization error of dequantized weights, without the original weights.

    b bits divide the range of a block into 2**b - 1 steps, and rounding to a step has the error step / sqrt(12). The
    estimate is within 10% for normally distributed weights.

    Arguments:
        weights: the dequantized weights.
        kind: their block type (``Q4_K``), or format (``GPTQ 4-bit``).
        block: consecutive values with one scale.
    """
    bits = int(re.sub(r"\D*(\d).*", r"\1", kind))
    steps = np.ptp(weights.reshape(-1, block), axis=1) / (2**bits - 1)
    return block * float(np.sum(steps**2, dtype=np.float64)) / 12


def _kinds(checkpoint: Checkpoint) -> dict[str, str]:
    from weights_io.inspect import stored_as

    kinds = {name: stored_as(tensor) for name, tensor in checkpoint.tensors.items()}
    return {name: kind for name, kind in kinds.items() if kind not in DTYPES and kind != "float64"}


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m weights_io.fuse")
