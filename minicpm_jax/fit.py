"""Will it fit on a TPU, and what will it cost? Compiles the program for that TPU, with no TPU present.

    python -m minicpm_jax.fit --model minicpm-2b --topology v5e:1x1 --job generate --max-seq-length 4096
    python -m minicpm_jax.fit --model minicpm-2b --topology v5e:2x4 --job finetune --batch-size 8 --grad-checkpoint

No weight is allocated or downloaded. Memory is XLA's plan. Bytes and collectives are counted in the compiled program
(`minicpm_jax.aot.hlo_cost`). Times are lower bounds: no program runs faster than its chip reads or multiplies.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from minicpm_data.option_checks import check_new_file
from minicpm_jax.aot.report import lines, remedies, report
from weights_io import command_line
from weights_io.checkpoint import config_of
from weights_io.command_line import Former, present_names
from weights_io.memory import size
from weights_io.progress import waiting
from weights_io.quantization.released import Format

if TYPE_CHECKING:
    from minicpm_jax.aot.programs import Job
    from minicpm_jax.aot.report import Report


@dataclass(frozen=True)
class Options:
    model: str = "minicpm-2b"
    """Short name from the catalogue (nothing is downloaded), model folder, or config.json."""
    topology: str = "v5e:1x1"
    """Kind (v2, v3, v4, v5e, v5p or v6e) and layout of the chips, such as v5e:2x4 or v4:2x2x1."""
    job: Literal["generate", "prefill", "lora", "finetune", "pretrain"] = "generate"
    """generate: one decode step; prefill: one chunk of a prompt; the others: one training step."""
    batch_size: Annotated[int, Former("batch")] = 1
    """Batch rows. In training: the rows of all chips together."""
    max_seq_length: Annotated[int, Former("seq")] = 4096
    """Cache length. In training: tokens of a row."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Dtype of weights and computation. The master weights of finetune and pretrain are float32."""
    quantize: Literal[4, 8, Format] | None = None
    """Bits of the quantized matrices of the layers (never of trained ones); in generation the head has 8 bits. Or the
    format of a quantized checkpoint, in the groups of the released file or of the tool, with a head in --dtype."""
    head_bits: Literal[8] | None = None
    """Bits of the head, where --quantize does not quantize it."""
    kv_bits: Literal[8] | None = None
    """Bits of the quantized key/value cache."""
    mesh: str | None = None
    """Axes and sizes of the mesh, such as fsdp=4,tensor=2. By default generation shards heads, and training shards
    weights."""
    grad_checkpoint: bool = False
    """Recompute each layer in the backward pass. This takes less memory and a third more work."""
    prefill_step_size: int = 512
    """Chunk size of a prompt in tokens."""
    rank: int = 8
    """Rank of the adapters of lora."""
    targets: tuple[str, ...] | None = None
    """Matrices with adapters; by default those of the command lora."""


@dataclass(frozen=True)
class CommandOptions(Options):
    json: bool = False
    """Print the figures as JSON. Alternatives are not tried if the program does not fit."""
    plot: Path | None = None
    """PNG file to draw the memory of a chip to: weights, cache and the rest as a stacked bar beside the chip's HBM."""


def compile_job(
    model: str = "minicpm-2b",
    topology: str = "v5e:1x1",
    job: Literal["generate", "prefill", "lora", "finetune", "pretrain"] = "generate",
    batch_size: int | None = None,
    max_seq_length: int | None = None,
    dtype: str = "bfloat16",
    quantize: int | str | None = None,
    mesh: str | None = None,
    **more: Any,
) -> Any:
    """Compile one of the project's programs for a TPU that need not be present.

    Arguments:
        model, topology, job, batch_size, max_seq_length, dtype, quantize, mesh: as in `Options`.
        more: the other fields of `Options`, and the former names ``batch`` and ``seq``.

    Returns:
        A `jax.stages.Compiled`.

    Raises:
        InputError: an argument is invalid.
        jax.errors.JaxRuntimeError: XLA's own error with RESOURCE_EXHAUSTED, if a chip has too little memory.
    """
    named = {"batch_size": batch_size, "max_seq_length": max_seq_length, "quantize": quantize, "mesh": mesh}
    given = present_names(Options, {name: value for name, value in named.items() if value is not None} | more)
    return job_of(Options(model, topology, job, dtype=dtype, **given)).compiled()  # type: ignore[arg-type]


def job_of(options: Options) -> "Job":
    from minicpm_jax.aot.programs import Job
    from minicpm_jax.parallel.chips import Topology

    named = {f.name: getattr(options, f.name) for f in dataclasses.fields(Options)}
    return Job(**named | {"topology": Topology.parse(options.topology)})


def main(options: CommandOptions) -> None:
    """Compile a program for a TPU that need not be present. Print its memory, and a bound on its speed."""
    config_of(options.model)  # the cheap checks come first
    if options.plot is not None:
        check_new_file(options.plot, "plot", ".png")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # leave a local TPU to its users
    with waiting("starting JAX"):
        from minicpm_jax.parallel.chips import Topology
        from minicpm_jax.parallel.sharding import warn_idle_mesh_axes

        Topology.parse(options.topology).devices()
        job = job_of(options)
    found = report(job)
    warn_idle_mesh_axes(job.config, job.placed, job.batch_size)
    bars = [(f"{options.job} of {options.model} on {options.topology}", found)]
    if options.json:
        import json

        picture(options, bars)
        print(json.dumps(dataclasses.asdict(found), indent=1))
        return
    for line in lines(job, found):
        print(line)
    if not found.fits:
        print("what would fit:", flush=True)
        none = True
        for flags, other in remedies(job):
            none = False
            print(f"  {flags}: {size(other.needed)} of {size(other.hbm)} a chip", flush=True)
            bars.append((f"with {flags}", other))
        if none:
            print("  nothing that was tried; more chips, and fewer rows or tokens together.")
    picture(options, bars)


def picture(options: CommandOptions, bars: "list[tuple[str, Report]]") -> None:
    """Draw --plot, if it is given."""
    if options.plot is not None:
        from minicpm_jax.aot.picture import draw

        draw(options.plot, bars)


if __name__ == "__main__":
    command_line.run(main, CommandOptions, "python -m minicpm_jax.fit")
