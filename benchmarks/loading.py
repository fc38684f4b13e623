"""Measure the time and the memory of loading a model, beside other programs on this machine.

    python -m benchmarks.loading --peer-python ~/torch/bin/python --save-path docs/loading.md

The model is a random Llama of MiniCPM-2B's size in bfloat16. It is written to --folder (5.5 to 6 GB) and deleted
afterwards. Each program loads the whole model in a process of its own. The programs take turns, and each figure is a
median. A program that is not installed is left out, with a message. ``--peer-python``: the Python with transformers.
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
    """Model from the catalogue whose shape is used."""
    layers: int | None = None
    """Number of layers. By default all layers of the model."""
    rounds: int = 3
    """Number of times that each program loads the model."""
    folder: Path | None = None
    """Folder to write the model to. By default the system's folder for temporary files."""
    peer_python: str = sys.executable
    """Python that has transformers."""
    save_path: Annotated[Path | None, Former("out")] = None
    """File to write the table to. By default the table is only printed."""


def main(options: Options) -> None:
    """Measure loading, and print the table."""
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
        throughput.start(READING, Path(folder), contest, given, {})  # brings the file into the page cache
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
float32 and keeps the weights in bfloat16. transformers maps the file and copies nothing: its weights are the page
cache.

"""


def table(options: Options, contest: Contest, size: int, in_jax: str, runs: dict[str, dict[str, list[float]]]) -> str:
    """The results in Markdown. ``in_jax``: the dtype of the weights in the JAX package."""
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
