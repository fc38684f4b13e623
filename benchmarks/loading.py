"""How long loading takes, and how much memory, beside other programs on this machine.

    python -m benchmarks.loading --peer-python ~/torch/bin/python --save-path docs/loading.md

A random Llama of MiniCPM-2B's size in bfloat16, written to --folder (5.5 to 6 GB, deleted afterwards) and loaded whole
by each program in a process of its own; they take turns, and of each figure the median counts. A program that is not
installed is left out, with a line that says so. ``--peer-python``: where transformers is.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from benchmarks import throughput
from benchmarks.models import THEIRS, shape_of, write_noise
from benchmarks.throughput import Contest
from minicpm_serve import backends
from weights_io import command_line
from weights_io.checkpoint import open_checkpoint
from weights_io.command_line import Former

READING = "reading the file"
PROGRAMS = ("minicpm_jax", "transformers", "minicpm_mlx", "mlx_lm")


@dataclass(frozen=True)
class Options:
    model: str = "minicpm-2b"
    """Of the catalogue: whose shape."""
    layers: int | None = None
    """Only so many; by default all."""
    rounds: int = 3
    """Times that each program loads."""
    folder: Path | None = None
    """Where the model is written for the time; by default where this system keeps what is temporary."""
    peer_python: str = sys.executable
    save_path: Annotated[Path | None, Former("out")] = None
    """Also write the table to this file."""


def main(options: Options) -> None:
    """Measure, and print the table."""
    raw = shape_of(options.model) | THEIRS | {"eos_token_id": None}
    if options.layers is not None:
        raw["num_hidden_layers"] = options.layers
    contest = Contest(("minicpm_jax",), "bfloat16", raw["num_hidden_layers"], raw["vocab_size"], 1, 1, "bfloat16")
    runs: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_noise(Path(folder), raw, "bfloat16")
        size = sum(file.stat().st_size for file in Path(folder).glob("model/*.safetensors"))
        in_jax = backends.get("jax").device.preferred_dtype(open_checkpoint(Path(folder, "model")), decoding=True)
        present, given = [READING, *PROGRAMS], throughput.Options(peer_python=options.peer_python)
        throughput.start(READING, Path(folder), contest, given, {})  # into the page cache
        for _ in range(options.rounds):
            present = [name for name in present if throughput.start(name, Path(folder), contest, given, runs)]
    text = table(options, contest, size, in_jax, {name: runs[name] for name in present})
    print(text, end="")
    if options.save_path is not None:
        options.save_path.write_text(HEADER.format(model=options.model) + text, "utf-8")


HEADER = """# Loading a model of {model}'s shape

`python -m benchmarks.loading` writes this file. Each program reads the same random Llama from one bfloat16 file, on
the same two CPU cores. Everything is imported and the file is in the page cache. The programs take turns, and each
figure is a median. "Peak" is the most memory that loading added. On a CPU without AMX the JAX package computes in
float32; its weights are then twice the size of the file. transformers maps the file and copies nothing: its weights
are the page cache.

"""


def table(options: Options, contest: Contest, size: int, in_jax: str, runs: dict[str, dict[str, list[float]]]) -> str:
    """``in_jax``: the dtype in which the JAX package holds the weights."""
    lines = [
        f"{options.model}, {contest.layers} layers, {size / 1e9:.2f} GB:\n",
        "| program | seconds | of reading | peak | of the weights in memory |",
        "|---|---|---|---|---|",
    ]
    reading = statistics.median(runs[READING]["seconds"])
    for name, found in runs.items():
        seconds, peak = (statistics.median(found[figure]) for figure in ("seconds", "peak"))
        held = peak / size / (2 if name == "minicpm_jax" and in_jax == "float32" else 1)
        lines.append(f"| {name} | {seconds:.1f} | {seconds / reading:.2f} | {peak / 1e9:.2f} GB | {held:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.loading")
