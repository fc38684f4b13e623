"""Convert a model to a Hugging Face folder, in its own architecture or as a Llama.

    python -m weights_io.convert --model openbmb/MiniCPM-2B-sft-bf16 --to llama --save-path minicpm-2b-llama

- ``--to hf`` rewrites any readable format (torch ``.bin`` files, GGUF) as safetensors.
- ``--to mlx`` does the same and adds the file with which the commands of `mlx_lm` run the model through this package.
- ``--to mlx -q`` also quantizes the matrices in MLX's format. With ``--ternary`` it packs those of BitCPM4 exactly.
- ``--to gptq`` and ``--to awq`` quantize the layers' matrices for PyTorch programs (transformers, vLLM).
- ``--to llama`` folds MiniCPM's scales into the weights, for programs that only know Llama.
- ``--to hf --unfold`` is the inverse of ``--to llama``.
- ``--to gguf`` writes one file for llama.cpp and the programs made of it (Ollama, LM Studio ...).

A quantized model (GPTQ, AWQ, bitsandbytes, MLX) is written dequantized unless ``-q`` is given: in float32, or with
``--dequantize`` in the dtype that it computes in, as by mlx_lm.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from weights_io.casting import Rounding
from weights_io.checkpoint import Checkpoint
from weights_io.command_line import Former
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.gguf_writing import OutType, architecture_of, save
from weights_io.parameters import count
from weights_io.progress import waiting
from weights_io.quantization.packed import PackedTensor
from weights_io.quantization.ternary import BITS, sampled_group, ternary_packing
from weights_io.quantization.writing import Affine
from weights_io.quantization.zero_points import ZeroPoints
from weights_io.rope_config import LongRoPE
from weights_io.write import Tensor, save_checkpoint

# A file beside the weights that names the model classes. mlx_lm uses these instead of its own.
MODEL_FILE = "minicpm_mlx_model.py"
PACKED = ("gptq", "awq")  # forms with zero points
MODEL_CODE = "from minicpm_mlx.model import Model, ModelArgs  # noqa: F401\n"


@dataclass(frozen=True)
class Options:
    model: Annotated[str, Former("hf_path")]
    """Model folder, GGUF file, hub id (owner/name, owner/name/folder) or short name from the catalogue (--hf-path in
    mlx_lm)."""
    to: Literal["hf", "llama", "mlx", "gptq", "awq", "gguf"]
    """hf: Hugging Face layout in the model's own architecture; mlx: the same, and mlx_lm opens it with
    --trust-remote-code if this package is installed; llama: LlamaForCausalLM, with MiniCPM's scales folded in; gptq,
    awq: quantized for PyTorch programs; gguf: a file for llama.cpp."""
    save_path: Annotated[Path, Former("out", "mlx_path")]
    """Folder to write (--mlx-path in mlx_lm). It must be empty or not exist yet. With --to gguf: the file to write,
    NAME.gguf."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the written weights. By default each tensor keeps its own dtype."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where --model is downloaded from if it is not on this disk."""
    unfold: bool = False
    """With --to hf: convert a MiniCPM in Llama format back to a MiniCPM with scales."""
    scale_emb: float = 12.0
    """With --unfold: factor on the embedding. The defaults of the three scales are those of all released MiniCPMs."""
    scale_depth: float = 1.4
    """With --unfold: factor on each residual branch, times 1 / sqrt(layers)."""
    dim_model_base: int = 256
    """With --unfold: base width; the logits are divided by hidden_size / dim_model_base."""
    quantize: Annotated[bool, tyro.conf.arg(aliases=("-q",))] = False
    """With --to mlx: quantize the matrices, as mlx_lm convert does. --to gptq and awq always do."""
    q_bits: Literal[2, 3, 4, 5, 6, 8] | None = None
    """With --quantize, gptq or awq: bits of each weight; 4 by default. gptq: 2, 3, 4 or 8; awq: 4."""
    q_group_size: Literal[32, 64, 128] | None = None
    """With --quantize: group size, the number of weights of a row that share a scale; 64 by default, for
    gptq and awq 128."""
    ternary: bool = False
    """With --quantize: pack only the matrices that have three values in each group (BitCPM4's), in 2 bits and without
    any error. The others, embedding and head are not quantized."""
    outtype: OutType | None = None
    """With --to gguf: type of the matrices, named as by llama.cpp: f32, f16 (the default), bf16, q8_0 (8.5 bits a
    weight), q4_0 (4.5) or q4_k_m (4.5 to 6.6, by tensor)."""
    modelfile: bool = False
    """With --to gguf: also write a Modelfile beside it, for ollama create."""
    q_mode: str = "affine"
    """With --quantize: affine is the one mode that is written."""
    dequantize: Annotated[bool, tyro.conf.arg(aliases=("-d",))] = False
    """Dequantize a quantized model to the dtype it computes in. Without --quantize and --dequantize, a quantized model
    is dequantized too, to float32."""


def main(options: Options) -> None:
    """Convert a model to a Hugging Face folder, in its own architecture or as a Llama."""
    from weights_io.command_line import command_above

    command_above("convert")(options)


def convert(checkpoint: Checkpoint, options: Options, tokenizer_files: Mapping[str, str]) -> list[str]:
    """Write the converted model to ``options.save_path``.

    Arguments:
        checkpoint: the model to convert.
        options: as on the command line.
        tokenizer_files: as in `write_model`.

    Returns:
        Lines for the user: the files and the rounding errors.

    Raises:
        InputError: as `weights_io.write.save_checkpoint`.
    """
    from weights_io.llama_format import from_llama, to_llama

    config = checkpoint.config
    tensors: Mapping[str, Tensor] = checkpoint.tensors
    rounding = Rounding()
    if options.to == "llama":
        config, tensors = to_llama(config, checkpoint.tensors, options.dtype, rounding)
    elif options.unfold:
        config, tensors = from_llama(
            config,
            checkpoint.tensors,
            options.scale_emb,
            options.scale_depth,
            options.dim_model_base,
            options.dtype,
            rounding,
        )
    packing: Affine | ZeroPoints | None = None
    if options.to in PACKED:
        packing = ZeroPoints(options.to, options.q_bits or 4, options.q_group_size or 128, options.to == "gptq")
        packing.matrices(config)
    elif options.quantize:
        packing = Affine(options.q_bits or 4, options.q_group_size or 64)
    if options.ternary:
        with waiting("looking for ternary matrices"):
            packing = ternary_packing(config, checkpoint.tensors)
        if packing is None:
            raise InputError(
                f"is for matrices with three values in each group, and {options.model} has none; leave it out.",
                "ternary",
            )
    usual = "float16" if options.to in PACKED else checkpoint.dtype
    dtype = options.dtype or (usual if packing is not None or options.dequantize else None)
    how: dict[str, Any] = {"for_mlx_lm": options.to == "mlx", "packing": packing}
    lines = write_model(options.save_path, checkpoint, config, tensors, dtype, rounding, tokenizer_files, **how)
    if options.to != "mlx" and (faults := _faults_of_mlx_lm(config)):
        lines.append(f"mlx_lm's own models {' and '.join(faults)}; --to mlx writes a model that it runs right")
    if options.quantize and not options.ternary and sampled_group(config, checkpoint.tensors) is not None:
        lines.append("the weights are ternary: with --ternary they are packed in 2 bits without an error")
    packed = [tensor for tensor in checkpoint.tensors.values() if isinstance(tensor, PackedTensor)]
    if packed and packing is None:
        lines.append(f"{len(packed)} matrices dequantized from {packed[0].kind}")
    elif options.dequantize:
        lines.append(f"no matrix of {options.model} was quantized")
    if options.unfold:
        state = "are the same numbers and are tied" if config.tie_word_embeddings else "differ and stay untied"
        lines.append(f"unfolded with these scales, head and embedding {state}")
    return lines


def convert_to_gguf(
    checkpoint: Checkpoint, options: Options, tokenizer: Mapping[str, Any], modelfile: str | None
) -> list[str]:
    """Write the model to the GGUF file ``options.save_path``.

    Arguments:
        checkpoint: the model to convert.
        options: as on the command line.
        tokenizer: the tokenizer's keys (`minicpm_data.tokenizer.gguf_writing.metadata_of`).
        modelfile: text of the Modelfile to write beside it; None: none.

    Returns:
        Lines for the user.

    Raises:
        InputError: as `weights_io.files.gguf_writing.save`.
    """
    out, kind = options.save_path, options.outtype or "f16"
    beside = {} if modelfile is None else {"Modelfile": modelfile}
    written = save(out, checkpoint.config, checkpoint.tensors, kind, tokenizer, checkpoint.path.stem, beside)
    kinds = Counter(tensor.kind for tensor in written)
    lines = [
        f"{out}: {architecture_of(checkpoint.config)}, {count(checkpoint.config):,} parameters, "
        f"{out.stat().st_size:,} bytes",
        "tensors: " + ", ".join(f"{number} {kind}" for kind, number in kinds.most_common()),
    ]
    packed = [tensor for tensor in checkpoint.tensors.values() if isinstance(tensor, PackedTensor)]
    if packed:
        lines.append(f"{len(packed)} matrices dequantized from {packed[0].kind}")
    if modelfile is not None:
        lines.append(f"{out.parent / 'Modelfile'}: ollama create NAME -f {out.parent / 'Modelfile'}")
    return lines


def write_model(
    out: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: str | None,
    rounding: Rounding,
    tokenizer_files: Mapping[str, str],
    for_mlx_lm: bool = False,
    packing: Affine | ZeroPoints | None = None,
) -> list[str]:
    """Write a model derived from ``checkpoint``, with the checkpoint's tokenizer and its ignored config keys.

    Arguments:
        out: folder to write.
        checkpoint: the source.
        config, tensors, dtype, packing: as in `save_checkpoint`.
        rounding: collects rounding errors; it may already hold those of computing the tensors.
        tokenizer_files: file name -> text of a GGUF file's tokenizer (`minicpm_data.tokenizer.writing.carried_files`);
            empty for a folder, whose files are copied.
        for_mlx_lm: add the file that names the model classes for mlx_lm.

    Returns:
        Lines for the user: the files and the rounding errors.

    Raises:
        InputError: as `save_checkpoint`.
    """
    beside = packing.files if isinstance(packing, ZeroPoints) else {}
    files = save_checkpoint(
        out,
        config,
        tensors,
        raw_config=checkpoint.raw_config,
        copy_from=checkpoint.path if checkpoint.path.is_dir() else None,
        added_keys={"model_file": MODEL_FILE} if for_mlx_lm else None,
        extra_files={**tokenizer_files, **({MODEL_FILE: MODEL_CODE} if for_mlx_lm else {}), **beside},
        dtype=dtype,
        rounding=rounding,
        packing=packing,
    )
    dtypes = {str(dtype or tensor.dtype) for tensor in tensors.values()}
    lines = [
        f"{files[0].parent}: {config.to_dict()['architectures'][0]}, {count(config):,} parameters, {len(tensors)} "
        f"tensors in {' and '.join(sorted(dtypes))}"
    ]
    lines += [f"  {file.name:34} {file.stat().st_size:>14,} bytes" for file in files]
    if packing is not None:
        packed, form = packing.matrices(config), "MLX" if isinstance(packing, Affine) else packing.form.upper()
        lines.append(
            f"{len(packed)} matrices in {packing.bits} bits and groups of {packing.group_size}, as {form} packs them"
        )
    if rounding.count:
        lines.append(_rounding_line(rounding, dtypes))
    return lines


def check(options: Options) -> None:
    """Raises `InputError` for options that cannot be combined."""
    if options.q_mode != "affine":
        raise InputError(f"is {options.q_mode}; affine is the one mode that is written here.", "q_mode")
    if (options.quantize or options.to in PACKED) and options.dequantize:
        raise InputError("and {quantize} do not go together; leave one of them out.", "dequantize", ["quantize"])
    if options.quantize and options.to not in ("mlx", *PACKED):
        remedy = "; {outtype} chooses the type of a GGUF file" if options.to == "gguf" else ""
        named = ["to", "outtype"] if remedy else ["to"]
        raise InputError(f"packs in MLX's form; use it with {{to}} mlx{remedy}.", "quantize", named)
    for name in ("outtype", "modelfile"):
        if getattr(options, name) and options.to != "gguf":
            raise InputError("is only used with {to} gguf; leave it out.", name, ["to"])
    if options.to == "gguf":
        if options.save_path.suffix != ".gguf":
            raise InputError(
                f"is {options.save_path}; give the file to write, such as {options.save_path}.gguf.", "save_path"
            )
        if options.dtype is not None:
            raise InputError("is for folders; {outtype} chooses the type of a GGUF file.", "dtype", ["outtype"])
        if options.dequantize:
            raise InputError(
                "is not needed with {to} gguf; {outtype} chooses the type.", "dequantize", ["to", "outtype"]
            )
    unused = [name for name in ("q_bits", "q_group_size") if getattr(options, name) is not None]
    unused += ["ternary"] * options.ternary
    if unused and not options.quantize and (options.ternary or options.to not in PACKED):
        raise InputError("is only used with {quantize}; leave it out or add {quantize}.", unused[0], ["quantize"])
    if options.ternary and (options.q_bits not in (None, BITS) or options.q_group_size is not None):
        name = "q_bits" if options.q_group_size is None else "q_group_size"
        raise InputError("is chosen by {ternary}; leave one of the two out.", name, ["ternary"])
    if options.unfold and options.to != "hf":
        raise InputError("leads away from the Llama format; use it with {to} hf.", "unfold", ["to"])
    given = [
        field.name
        for field in dataclasses.fields(options)
        if field.name in ("scale_emb", "scale_depth", "dim_model_base")
        and getattr(options, field.name) != field.default
    ]
    if given and not options.unfold:
        raise InputError("is only used with {unfold}; leave it out or add {unfold}.", given[0], ["unfold"])


def _faults_of_mlx_lm(config: ModelConfig) -> list[str]:
    """What mlx_lm 0.32.2 computes otherwise without a word."""
    scaling = config.rope_scaling
    faults = []
    if isinstance(scaling, LongRoPE) and scaling.short_factor != scaling.long_factor:
        faults.append("always take longrope's long factors")
    if config.is_latent:
        faults.append("compute the norms of MiniCPM3's latents and its tied head otherwise")
    return faults


def _rounding_line(rounding: Rounding, dtypes: set[str]) -> str:
    line = (
        f"rounded to {' and '.join(sorted(dtypes))}: worst relative error {rounding.worst:.2g}, "
        f"mean {rounding.mean:.2g} of {rounding.count:,} numbers"
    )
    if rounding.vanished:
        line += f", {rounding.vanished:,} became 0"
    return line if dtypes == {"float32"} else f"{line}; --dtype float32 keeps them to 6e-08"


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m weights_io.convert")
