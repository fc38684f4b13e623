"""Memory, traffic and speed limit of a compiled program, and the variants that would fit."""

import dataclasses
import importlib.metadata
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weights_io.memory import size
from weights_io.progress import waiting

if TYPE_CHECKING:
    from minicpm_jax.aot.programs import Job
    from minicpm_jax.parallel.chips import Topology


TRIES = 8  # most programs compiled in search of one that fits


@dataclass
class Report:
    """The figures of one program on one chip, in bytes and seconds."""

    topology: str
    mesh: str  # "" on one chip
    hbm: int  # memory of a chip
    needed: int  # arguments + results not aliased to arguments + temporaries + the program itself
    fits: bool
    arguments: int = 0
    held: dict[str, int] = field(default_factory=dict)  # the largest arguments: weights, optimizer, cache
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    program: int = 0
    compile_seconds: float = 0.0
    hbm_traffic: int = 0  # bytes read and written per call (generate: per step); 0: the program's text cannot be read
    flops: float = 0.0
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds_to_read: float = 0.0  # at the chip's full bandwidth
    seconds_to_compute: float = 0.0  # at its peak
    tokens: int = 0  # per call on all chips
    tokens_per_second: float = 0.0  # at most


def report(job: "Job") -> Report:
    """Compile the job's program and measure it. A program that is too large for XLA is also a report."""
    import jax

    from minicpm_jax.aot import hlo_cost
    from minicpm_jax.aot.flops import flops
    from minicpm_jax.aot.programs import compiled

    what = f"{job.job} of {job.model} for {job.topology}"
    with waiting(f"tracing {what}"):
        traced = job.traced()
        lowered = traced.lower()
    chip, devices = job.topology.chip, len(job.devices)
    cores = devices // job.topology.chips
    found = Report(str(job.topology), "" if job.placed is None else _text(job.placed), chip.hbm // cores, 0, False)
    found.held, began = job.held, time.perf_counter()
    try:
        with waiting(f"compiling {what}"):
            program = compiled(lowered)
    except Exception as error:  # jax.errors.JaxRuntimeError has no subclasses
        found.needed = _exhausted(error)
        return found
    found.compile_seconds = time.perf_counter() - began
    memory, traffic = program.memory_analysis(), hlo_cost.Traffic()
    try:
        with waiting(f"counting the bytes of {what}"):
            traffic = hlo_cost.traffic(program.as_text())
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
    """Bytes, including arguments, of a program that XLA reports as out of memory (0: unknown); other errors are
    re-raised."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT]?)(?: of|\) exceeds)", text)
    return int(float(found[1]) * units[found[2]]) if found else 0


def remedies(job: "Job") -> Iterator[tuple[str, Report]]:
    """Flags to change and the report of each changed program that fits; at most two."""
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
    """(kind, flags, job), cheapest first; the first of a kind that fits is enough."""
    change = dataclasses.replace
    extra = ""
    if job.training:
        if not job.grad_checkpoint:
            job, extra = change(job, grad_checkpoint=True), " --grad-checkpoint"
            yield "checkpoint", extra.strip(), job
        if job.job == "lora" and job.quantize in (None, 8):
            yield "quantize", f"--quantize 4{extra}", change(job, quantize=4)
    else:
        if job.kv_bits is None:
            yield "cache", "--kv-bits 8", change(job, kv_bits=8)
        for bits in (8, 4):
            if job.quantize is None or (isinstance(job.quantize, int) and bits < job.quantize):
                yield "quantize", f"--quantize {bits}", change(job, quantize=bits)
    for topology in _larger(job.topology):
        batch = job.batch_size
        flags = f"--topology {topology}{extra}"
        if job.training and batch % topology.chips:
            batch = topology.chips
            flags += f" --batch-size {batch}"
        yield "topology", flags, change(job, topology=topology, batch_size=batch, mesh=None)
    for times in (2, 4, 8):
        if job.batch_size % times == 0:
            yield (
                "batch",
                f"--batch-size {job.batch_size // times}{extra}",
                change(job, batch_size=job.batch_size // times),
            )
        if job.max_seq_length // times >= 512:
            yield (
                "seq",
                f"--max-seq-length {job.max_seq_length // times}{extra}",
                change(job, max_seq_length=job.max_seq_length // times),
            )


def _larger(topology: "Topology") -> "list[Topology]":
    """Chips with more memory in the same number, and more chips of the same kind."""
    from minicpm_jax.parallel.chips import CHIPS

    larger = []
    if topology.chip.name == "v5e":
        larger.append(dataclasses.replace(topology, chip=CHIPS["v6e"]))
    for _ in range(3):
        topology = topology.doubled()
        larger.append(topology)
    return larger


def lines(job: "Job", found: Report) -> Iterator[str]:
    """The printed form of a report."""
    what = f"{job.job} of {job.model} on {found.topology}" + (f" ({found.mesh})" if found.mesh else "")
    if job.training:
        yield f"{what}: {job.batch_size} x {job.max_seq_length:,} tokens a step"
    elif job.job == "generate":
        yield f"{what}: a token of each of {job.batch_size} rows, cache of {job.slots:,} slots"
    else:
        tokens = job.tokens // job.batch_size
        yield f"{what}: {tokens} tokens of each of {job.batch_size} rows, cache of {job.slots:,} slots"
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
