"""Compare our model with google-tunix's Llama3 of the same shape, both compiled for absent TPUs.

    python -m benchmarks.tunix_peer --peer-python ~/tunix/bin/python --save-path docs/tunix.md

Each program is traced and compiled in a process of its own, one after the other. The programs are the greedy decoding
loop, and the loss with its gradients for all weights and with each layer recomputed. Both use bfloat16, the shape of
MiniCPM-1B and the same mesh. ``--peer-python``: a Python with google-tunix and libtpu, and with the same releases of
jax and libtpu as here.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from benchmarks.models import wide
from weights_io import command_line
from weights_io.command_line import Former
from weights_io.errors import InputError
from weights_io.memory import size


@dataclass(frozen=True)
class Options:
    peer_python: str = sys.executable
    """Python that has google-tunix and libtpu."""
    save_path: Annotated[Path, Former("out")] = Path("tunix.md")
    """File to write."""
    layers: int = 52
    """Layers of both models. The whole MiniCPM-1B has 52."""
    words: int = 73440
    """Vocabulary size."""
    only: str = ""
    """Compile only cases with this text in their title. The other lines of the file stay."""
    worker: tuple[str, Path] | None = None
    """Run as the process that compiles one of our programs: its case, and the file for the figures."""


@dataclass(frozen=True)
class Case:
    job: str  # decode or train
    topology: str
    fsdp: int
    tensor: int
    batch: int
    seq: int

    @property
    def title(self) -> str:
        mesh = "" if self.fsdp * self.tensor == 1 else f" fsdp={self.fsdp},tensor={self.tensor}"
        return f"{self.job} {self.batch} x {self.seq:,}, {self.topology}{mesh}"


CASES = (
    Case("decode", "v5e:1x1", 1, 1, 1, 4096),
    Case("decode", "v5e:1x1", 1, 1, 16, 4096),
    Case("decode", "v5e:2x4", 4, 2, 8, 4096),
    Case("train", "v5e:1x1", 1, 1, 1, 2048),
    Case("train", "v5e:2x4", 8, 1, 8, 2048),
    Case("train", "v5e:2x4", 4, 2, 8, 2048),
)

NEEDED = ("tunix", "libtpu")

HEADER = """# Beside google-tunix, compiled for TPUs

`python -m benchmarks.tunix_peer` writes the table. It compares the Llama3 of google-tunix 0.1.7 with our model, both
in the shape of MiniCPM-1B ({layers} layers, a vocabulary of {words:,}) and in bfloat16. The same jax and libtpu
compile both for absent chips.

- Decoding is the greedy loop of each sampler, with a cache of 4,096 that is full.
- Training is the loss and its gradients for all weights, with each layer recomputed and without an optimizer.
- Compile times are those of two busy cores.
- HBM traffic and the bytes between chips are those of one step on one chip, from `minicpm_jax.aot.hlo_cost`. The
  memory of a chip is arguments and temporaries.
- When tunix decodes, its axis fsdp shards rows and no weights. Our axis data does the same, so our program uses that
  axis.

| program | of | tracing | compiling | code | lines of HLO | arguments | temporaries | HBM traffic | between chips |
|---|---|---|---|---|---|---|---|---|---|
"""


def main(options: Options) -> None:
    """Compile the programs of both packages, and write the table."""
    if options.worker is not None:
        ours(json.loads(options.worker[0]), options.worker[1])
        return
    here = f"import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, {NEEDED})))"
    if subprocess.run([options.peer_python, "-c", here]).returncode:
        raise InputError(
            f"{options.peer_python} lacks google-tunix or libtpu; install both there.", option="peer_python"
        )
    before = options.save_path.read_text("utf-8").splitlines() if options.save_path.exists() else []
    of = {f"| {case.title} | {whose} | ": (case, whose) for case in CASES for whose in ("ours", "tunix")}
    table = {beginning: next((line for line in before if line.startswith(beginning)), "") for beginning in of}
    for beginning, (case, whose) in of.items():
        if options.only in case.title:
            table[beginning] = beginning + " | ".join(cells(case, whose, options)) + " |"
            print(table[beginning], flush=True)
            header = HEADER.format(layers=options.layers, words=options.words)
            options.save_path.write_text(header + "".join(line + "\n" for line in table.values() if line), "utf-8")


def cells(case: Case, whose: str, options: Options) -> Iterator[str]:
    from minicpm_jax.aot import hlo_cost
    from minicpm_jax.aot.libtpu import ALONE

    given = json.dumps(asdict(case) | {"shape": wide(options.layers, options.words)})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / whose
        command = [sys.executable, "-m", "benchmarks.tunix_peer", "--worker", given, str(out)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        if whose == "tunix":
            program = Path(__file__).with_name("tunix_program.py")
            command = [options.peer_python, str(program), given, str(out)]
            environment |= ALONE
            environment.pop("LIBTPU_INIT_ARGS", None)  # the flags that our package set
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode:
            last = ran.stderr.strip().splitlines()[-1:]
            raise InputError(f"{case.title} of {whose} did not compile: {''.join(last)}")
        figures = json.loads(out.with_suffix(".json").read_text("utf-8"))
        yield f"{figures['tracing']:.1f} s"
        if "exhausted" in figures:
            yield f"does not fit: {figures['exhausted']}"
            return
        text = out.with_suffix(".txt").read_text("utf-8")
    yield f"{figures['compiling']:.1f} s"
    yield size(figures["code"])
    yield f"{text.count(chr(10)):,}"
    yield size(figures["arguments"])
    yield size(figures["temporaries"])
    found = hlo_cost.traffic(text)
    yield size(found.hbm)
    yield ", ".join(f"{kind} {count:,}: {size(found.bytes[kind])}" for kind, count in sorted(found.counts.items()))


def ours(case: dict[str, Any], out: Path) -> None:
    """Compile our program as `minicpm_jax.fit` does, but training without the optimizer."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks.tunix_program import measured
    from minicpm_jax import fit

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case["shape"]), "utf-8")
        # In decoding, the axis fsdp of tunix shards only the batch rows, as our axis data does.
        names = {"fsdp" if case["job"] == "train" else "data": case["fsdp"], "tensor": case["tensor"]}
        mesh = ",".join(f"{name}={size}" for name, size in names.items() if size > 1)
        job = fit.job_of(
            fit.Options(
                folder,
                case["topology"],
                "finetune" if case["job"] == "train" else "generate",
                case["batch"],
                case["seq"],
                mesh=mesh or None,
                grad_checkpoint=True,
            )
        )
        call = job.call
    if case["job"] == "decode":
        measured(call.function, call.arguments, out, call.fixed)
        return
    (masters, _), _, batches, *_ = call.arguments
    trained, objective = call.fixed["trained"], call.fixed["objective"]

    def step(weights: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda w: objective(trained.model(None, w), batch), has_aux=True)(weights)

    def of_one(x: Any) -> Any:
        where = x.sharding
        if isinstance(where, NamedSharding):
            where = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=where)

    weights = {name: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=x.sharding) for name, x in masters.items()}
    where = {name: x.sharding for name, x in weights.items()}
    function = jax.jit(step, out_shardings=(None, where))
    measured(function, (weights, jax.tree.map(of_one, batches)), out, {})


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.tunix_peer")
