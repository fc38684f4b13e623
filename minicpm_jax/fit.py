"""Will it fit on a TPU, and what will it cost? Compiles the program that would run there, with no TPU present.

    python -m minicpm_jax.fit --model minicpm-2b --topology v5e:1x1 --job generate --seq 4096
    python -m minicpm_jax.fit --model minicpm-2b --topology v5e:2x4 --job finetune --batch 8 --grad-checkpoint

No weight is allocated or downloaded. Memory is what XLA planned, bytes and collectives are counted in its program
(`minicpm_jax.hlo`), times are floors: no program runs faster than its chip reads, or multiplies.
"""

import dataclasses
import importlib.metadata
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from weights_io import command_line
from weights_io.memory import size

if TYPE_CHECKING:
    from minicpm_jax.chips import Topology
    from minicpm_jax.jobs import Job

TRIES = 8  # most programs that are compiled to find one that fits


@dataclass(frozen=True)
class Options:
    model: str = "minicpm-2b"
    """Short name of the catalogue (nothing is downloaded), folder, or config.json."""
    topology: str = "v5e:1x1"
    """Kind and arrangement of the chips: v2, v3, v4, v5e, v5p or v6e, such as v5e:2x4 or v4:2x2x1."""
    job: Literal["generate", "prefill", "lora", "finetune", "pretrain"] = "generate"
    """A step of decoding, a piece of a prompt, or a step of training."""
    batch: int = 1
    """Rows; in training over all chips together."""
    seq: int = 4096
    """Slots of the cache; in training tokens of a row."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Of weights and computation; masters of finetune and pretrain are float32."""
    quantize: Literal[4, 8] | None = None
    """Keep the matrices of the layers in so many bits (not of what is trained); to generate, the head in 8."""
    kv_bits: Literal[8] | None = None
    """Keep keys and values in so many bits."""
    mesh: str | None = None
    """How the chips are arranged, such as fsdp=4,tensor=2; by default generation splits heads, training weights."""
    grad_checkpoint: bool = False
    """Recompute each layer in the backward pass: less memory, a third more work."""
    prefill_step_size: int = 512
    """Tokens of a prompt that are run together."""
    rank: int = 8
    """Of the adapters of lora."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Matrices with adapters."""


@dataclass(frozen=True)
class CommandOptions(Options):
    json: bool = False
    """Print the figures as JSON, and try nothing else where it does not fit."""


@dataclass
class Report:
    """Of one program, on one chip. Bytes and seconds."""

    topology: str
    mesh: str  # "" on one chip
    hbm: int  # that a chip has
    needed: int  # arguments + results that take no argument's place + temporaries + the program itself
    fits: bool
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    program: int = 0
    compile_seconds: float = 0.0
    hbm_traffic: int = 0  # bytes read and written by a call (of generate: a step); 0: the program cannot be read
    flops: float = 0.0
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds_to_read: float = 0.0  # at the chip's full bandwidth
    seconds_to_compute: float = 0.0  # at its peak
    tokens: int = 0  # of a call on all chips
    tokens_per_second: float = 0.0  # at most


def compile_job(
    model: str = "minicpm-2b",
    topology: str = "v5e:1x1",
    job: Literal["generate", "prefill", "lora", "finetune", "pretrain"] = "generate",
    batch: int = 1,
    seq: int = 4096,
    dtype: str = "bfloat16",
    quantize: int | None = None,
    mesh: str | None = None,
    **more: Any,
) -> Any:
    """The project's own program, compiled for a TPU that need not exist: a `jax.stages.Compiled`.

    Arguments as the flags of the command (`Options`), ``more`` the rest of them. Raises `InputError` for what cannot
    be; where the memory of a chip does not suffice, XLA's own error says RESOURCE_EXHAUSTED.
    """
    given = Options(model, topology, job, batch, seq, dtype, quantize, mesh=mesh, **more)  # type: ignore[arg-type]
    return job_of(given).compiled()


def job_of(options: Options) -> "Job":
    from minicpm_jax.chips import Topology
    from minicpm_jax.jobs import Job

    named = {f.name: getattr(options, f.name) for f in dataclasses.fields(Options)}
    return Job(**named | {"topology": Topology.parse(options.topology)})


def report(job: "Job") -> Report:
    """Compile it and measure. A program that XLA finds too large is a report too."""
    import jax

    from minicpm_jax import hlo
    from minicpm_jax.flops import flops
    from minicpm_jax.jobs import compiled

    traced = job.traced()
    chip, devices = job.topology.chip, len(job.devices)
    cores = devices // job.topology.chips
    found = Report(str(job.topology), "" if job.placed is None else _text(job.placed), chip.hbm // cores, 0, False)
    lowered, began = traced.lower(), time.perf_counter()
    try:
        program = compiled(lowered)
    except Exception as error:  # jax.errors.JaxRuntimeError, which has no kinds of its own
        found.needed = _exhausted(error)
        return found
    found.compile_seconds = time.perf_counter() - began
    memory, traffic = program.memory_analysis(), hlo.Traffic()
    try:
        traffic = hlo.traffic(program.as_text())
    except jax.errors.JaxRuntimeError:  # JAX cannot always read back what libtpu compiled: "async-update should have 1"
        pass
    found.arguments, found.outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    found.aliased, found.temporaries = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    found.program = memory.generated_code_size_in_bytes
    found.needed = found.arguments + found.outputs - found.aliased + found.temporaries + found.program
    found.fits = found.needed <= found.hbm
    found.hbm_traffic = traffic.hbm
    found.flops = flops(traced.jaxpr) / devices
    found.collectives = {
        kind: {"count": count, "bytes": traffic.bytes[kind]} for kind, count in sorted(traffic.counts.items())
    }
    found.seconds_to_read = found.hbm_traffic / (chip.bandwidth / cores)
    found.seconds_to_compute = found.flops / (chip.flops / cores)
    found.tokens = job.tokens
    found.tokens_per_second = found.tokens / max(found.seconds_to_read, found.seconds_to_compute)
    return found


def _text(mesh: Any) -> str:
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items())


def _exhausted(error: Exception) -> int:
    """Bytes, arguments among them, of a program for which XLA says that a chip has too few (0: it does not say how
    many); other errors are raised again."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT]?)(?: of|\) exceeds)", text)
    return int(float(found[1]) * units[found[2]]) if found else 0


def remedies(job: "Job") -> Iterator[tuple[str, Report]]:
    """What to change, and what came of it: the programs that fit, at most two, of those worth a try."""
    from weights_io.errors import InputError

    tried = found = 0
    kinds = set()
    for kind, flags, other in _alternatives(job):
        if tried == TRIES or found == 2:
            return
        if kind in kinds:
            continue
        try:
            if other.argument_bytes > other.topology.chip.hbm:
                continue
            tried += 1
            result = report(other)
        except InputError:
            continue
        if result.fits:
            found += 1
            kinds.add(kind)
            yield flags, result


def _alternatives(job: "Job") -> "Iterator[tuple[str, str, Job]]":
    """(kind, flags, job), the cheapest first; of a kind the first that fits is enough."""
    change = dataclasses.replace
    extra = ""
    if job.training:
        if not job.grad_checkpoint:
            job, extra = change(job, grad_checkpoint=True), " --grad-checkpoint"
            yield "checkpoint", extra.strip(), job
        if job.job == "lora" and job.quantize != 4:
            yield "quantize", f"--quantize 4{extra}", change(job, quantize=4)
    else:
        if job.kv_bits is None:
            yield "cache", "--kv-bits 8", change(job, kv_bits=8)
        for bits in (8, 4):
            if job.quantize is None or bits < job.quantize:
                yield "quantize", f"--quantize {bits}", change(job, quantize=bits)
    for topology in _larger(job.topology):
        batch = job.batch
        flags = f"--topology {topology}{extra}"
        if job.training and batch % topology.chips:
            batch = topology.chips
            flags += f" --batch {batch}"
        yield "topology", flags, change(job, topology=topology, batch=batch, mesh=None)
    for times in (2, 4, 8):
        if job.batch % times == 0:
            yield "batch", f"--batch {job.batch // times}{extra}", change(job, batch=job.batch // times)
        if job.seq // times >= 512:
            yield "seq", f"--seq {job.seq // times}{extra}", change(job, seq=job.seq // times)


def _larger(topology: "Topology") -> "list[Topology]":
    """The same number of chips with more memory, and the same chips in a larger number."""
    from minicpm_jax.chips import CHIPS

    larger = []
    if topology.chip.name == "v5e":
        larger.append(dataclasses.replace(topology, chip=CHIPS["v6e"]))
    for _ in range(3):
        topology = topology.doubled()
        larger.append(topology)
    return larger


def main(options: CommandOptions) -> None:
    """Compile a job of a model for a TPU that need not be here: what it takes, and how fast it can be at most."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a TPU that is here would be taken from those who use it
    from minicpm_jax.chips import Topology
    from minicpm_jax.sharding import note_idle

    Topology.parse(options.topology).devices()  # first what costs nothing
    job = job_of(options)
    found = report(job)
    note_idle(job.config, job.placed, job.batch)
    if options.json:
        import json

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
        if none:
            print("  nothing that was tried; more chips, and fewer rows or tokens together.")


def lines(job: "Job", found: Report) -> Iterator[str]:
    """What is printed of a report."""
    what = f"{job.job} of {job.model} on {found.topology}" + (f" ({found.mesh})" if found.mesh else "")
    if job.training:
        yield f"{what}: {job.batch} x {job.seq:,} tokens a step"
    elif job.job == "generate":
        yield f"{what}: a token of each of {job.batch} rows, cache of {job.slots:,} slots"
    else:
        yield f"{what}: {job.tokens // job.batch} tokens of each of {job.batch} rows, cache of {job.slots:,} slots"
    verdict = "fits" if found.fits else "does not fit"
    needed = size(found.needed) if found.needed else "more than there is"
    yield f"memory a chip    {needed} of {size(found.hbm)}: {verdict}"
    if not found.arguments:
        return
    parts = ("arguments", "outputs", "aliased", "temporaries", "program")
    yield "                 " + ", ".join(f"{name} {size(getattr(found, name))}" for name in parts)
    yield f"compiling        {found.compile_seconds:.1f} s here, by libtpu {importlib.metadata.version('libtpu')}"
    reading, computing = found.seconds_to_read * 1e3, found.seconds_to_compute * 1e3
    if found.hbm_traffic:
        yield f"HBM traffic      {size(found.hbm_traffic)} a chip: {reading:,.2f} ms at its bandwidth"
    else:
        yield "HBM traffic      unknown, as JAX cannot read this program back from libtpu"
    yield f"arithmetic       {found.flops / 1e9:,.1f} GFLOP a chip: {computing:,.2f} ms at its peak"
    for kind, figures in found.collectives.items():
        yield f"{kind:16} {figures['count']:,} times, {size(figures['bytes'])} a chip"
    yield f"at most          {found.tokens_per_second:,.0f} tokens/s on {job.topology.chips} chip(s)"


if __name__ == "__main__":
    command_line.run(main, CommandOptions, "python -m minicpm_jax.fit")
