"""Measure prompt and answer tokens per second, loading and memory, beside other programs on this machine.

    python -m benchmarks.throughput --peer-python ~/torch/bin/python --save-path docs/throughput

All programs run the same random Llama of MiniCPM-1B's width on two threads. Each has a process of its own, which stays
alive. The programs take turns, and each figure is a median. The command writes the figures (.json), a table (.md) and a
picture (.png). A program that is not installed is left out, with a message. ``--peer-python``: the Python that has
transformers and xllamacpp.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from benchmarks import peers
from benchmarks.models import wide, write_llama
from minicpm_data import plots
from weights_io import command_line
from weights_io.command_line import Former
from weights_io.errors import InputError

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Options:
    rounds: int = 5
    """Number of times that each program loads. It has twice as many timed runs."""
    layers: int = 8
    """Layers of the model for JAX, transformers and llama.cpp. The whole model has 52."""
    words: int = 16384
    """Vocabulary size."""
    prompt: int = 128
    """Tokens of the prompt."""
    tokens: int = 32
    """Tokens of the answer."""
    mlx_layers: int = 2
    """Layers of the smaller model for MLX, which is slow on a CPU."""
    mlx_words: int = 4096
    """Vocabulary size of the smaller model."""
    mlx_prompt: int = 32
    """Tokens of the prompt for the smaller model."""
    mlx_tokens: int = 9
    """Tokens of the answer of the smaller model."""
    peer_python: str = sys.executable
    """Python that has transformers and xllamacpp."""
    save_path: Annotated[Path, Former("out")] = Path("throughput")
    """Name of the files to write, without .json, .md and .png."""
    only: tuple[str, ...] = ()
    """Measure again only the comparisons with these packages (minicpm_mlx). The other figures stay as they are."""
    worker: tuple[str, Path, Precision, int, int, int] | None = None
    """Run as one of the programs: name, folder, precision, prompt, tokens, words."""


@dataclass(frozen=True)
class Contest:
    """Programs that run the same model. The first one is ours."""

    names: tuple[str, ...]
    precision: Precision  # the dtype of the computation
    layers: int
    words: int
    prompt: int
    tokens: int
    file: Precision = "float32"

    @property
    def title(self) -> str:
        return f"{self.names[0]}, {self.precision}" + (f" of a {self.file} file" if self.file != self.precision else "")


def main(options: Options) -> None:
    """Measure all programs, and write the table and the picture."""
    if options.worker is not None:
        name, folder, precision, prompt, tokens, words = options.worker
        ids = np.random.default_rng(0).integers(3, words, prompt).tolist()
        peers.main(name, folder, precision, ids, tokens)
        return
    large = (options.layers, options.words, options.prompt, options.tokens)
    small = (options.mlx_layers, options.mlx_words, options.mlx_prompt, options.mlx_tokens)
    both = ("minicpm_jax", "transformers", "llama.cpp")
    contests = [Contest(both, "float32", *large), Contest(both, "bfloat16", *large, file="bfloat16")]
    # As MiniCPM was released. llama.cpp is left out: it rounds activations to bfloat16 for bfloat16 weights.
    contests.append(Contest(both[:2], "float32", *large, file="bfloat16"))
    contests.append(Contest(("minicpm_mlx", "mlx_lm"), "float32", *small))
    path = options.save_path.with_suffix(".json")
    if options.only and not path.exists():
        raise InputError(f"adds to {path}, which is not there; measure everything first.", option="only")
    last = json.loads(path.read_text("utf-8")) if options.only else {}
    found = {}
    for contest in contests:
        ours = contest.names[0]
        if options.only and ours not in options.only:
            found[contest.title] = last[contest.title]
            continue
        figures, size = measured(contest, options)
        found[contest.title] = {"figures": figures, "size": size}
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    parts = [table(contest, **found[contest.title]) for contest in contests]
    options.save_path.with_suffix(".md").write_text(HEADER + "\n".join(parts), "utf-8")
    draw([(contest, found[contest.title]["figures"]) for contest in contests], options.save_path.with_suffix(".png"))


HEADER = """# Beside other programs, on two cores of a CPU

`python -m benchmarks.throughput` writes this file. All programs run the same Llama of MiniCPM-1B's width with random
weights. The number of layers and the vocabulary ("words") are stated. Each program gets one prompt and two threads.
The programs take turns, and each figure is a median. Ratios are more reliable than seconds. "Loading" is measured
with everything imported and the file in the page cache. "Peak" is the most memory that loading added, as a multiple
of the file size. A value of "of ours" below 1 is slower than ours.

![tokens a second](throughput.png)

A CPU with AMX was measured (a Xeon, two quiet cores). Nearly all figures in bfloat16 depend on AMX, which multiplies
bfloat16 matrices. On a CPU without AMX minicpm_jax computes in float32, and keeps the weights of a bfloat16 file in
bfloat16. The second row is of another machine on another day, with as many layers of the same width
([benchmarks.md](benchmarks.md#comparison-with-other-programs)).

| CPU, bfloat16 file | prompt of 128 tokens | answer of 32 tokens | take |
|---|---|---|---|
| Xeon with AMX | 0.12 s | 0.7 s | minicpm_jax |
| Xeon without AMX (AVX512_BF16) | 0.40 to 0.48 s | 1.2 to 1.4 s | transformers to read, llama.cpp to write |

Before some of this was mended, transformers read prompts and llama.cpp wrote answers twice as fast as minicpm_jax.
`lscpu | grep amx` prints nothing on such a CPU. Both programs open the folder that
`python -m weights_io.convert --to llama` writes; llama.cpp converts it first. Macs and TPUs are another matter: see
[measured.md](measured.md) and [fit.md](fit.md).

"""


def measured(contest: Contest, options: Options) -> tuple[dict[str, dict[str, float]], int]:
    """The medians of each program, and the size of the file in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        write_llama(world, wide(contest.layers, contest.words), contest.file)
        size = sum(file.stat().st_size for file in (world / "model").glob("*.safetensors"))
        runs: dict[str, dict[str, list[float]]] = {}
        present = [name for name in contest.names if start(name, world, contest, options, runs)]
        for _ in range(options.rounds - 1):
            for name in ("reading the file", *present):
                start(name, world, contest, options, runs)
        workers = {name: worker(name, world, contest, options) for name in present}
        for process in workers.values():
            process.stdout.readline()  # wait until it has loaded
        order = random.Random(0)  # random order, because threads of the previous program may still be awake
        for turn in range(2 * options.rounds + 1):
            for name in order.sample(present, len(present)):
                process = workers[name]
                process.stdin.write("go\n")
                process.stdin.flush()
                run = json.loads(process.stdout.readline())
                for figure in ("prompt", "decode") if turn else ():  # the first run warms up
                    runs[name].setdefault(figure, []).append(run[figure])
        for process in workers.values():
            process.stdin.close()
            process.wait()
    medians = {name: {figure: statistics.median(all_) for figure, all_ in each.items()} for name, each in runs.items()}
    return medians, size


def worker(name: str, world: Path, contest: Contest, options: Options) -> Any:
    python = options.peer_python if name in ("transformers", "llama.cpp") else sys.executable
    numbers = (contest.prompt, contest.tokens, contest.words)
    command = [python, "-m", "benchmarks.throughput", "--worker", name, str(world), contest.precision]
    command += map(str, numbers)
    quiet = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(peers.THREADS), "HF_HUB_OFFLINE": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, text=True, env={**os.environ, **quiet}, **pipes)


def start(name: str, world: Path, contest: Contest, options: Options, runs: dict[str, Any]) -> bool:
    """Let a program load and exit. Returns False if it cannot run."""
    process = worker(name, world, contest, options)
    line, _ = process.communicate()
    if process.returncode or not line:
        if name == contest.names[0]:
            raise InputError(f"{name} does not run here.")
        print(f"{name} is left out: it does not run with {options.peer_python}.", file=sys.stderr)
        return False
    for figure, value in json.loads(line.splitlines()[0]).items():
        runs.setdefault(name, {}).setdefault(figure, []).append(value)
    return True


def table(contest: Contest, figures: dict[str, dict[str, float]], size: int) -> str:
    lines = [
        f"## {contest.title}, {contest.layers} layers, {contest.words:,} words, {size / 1e6:,.0f} MB\n",
        f"| program | prompt of {contest.prompt}, tokens/s | of ours | {contest.tokens} tokens of an answer, tokens/s "
        "| of ours | loading, s | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = figures[contest.names[0]]
    for name, found in figures.items():
        speed = ["", "", "", ""]
        if "prompt" in found:
            speed = [part for key in ("prompt", "decode") for part in (f"{found[key]:.1f}", ratio(found, ours, key))]
        lines.append(f"| {name} | {' | '.join(speed)} | {found['seconds']:.2f} | {found['peak'] / size:.2f} |")
    return "\n".join(lines) + "\n"


def ratio(found: dict[str, float], ours: dict[str, float], key: str) -> str:
    return f"{found[key] / ours[key]:.2f}"


def draw(bars: Sequence[tuple[Contest, dict[str, dict[str, float]]]], path: Path) -> None:
    """A row of the picture for each contest, with the speed of the prompt and of the answer beside each other."""
    made, axes = plots.figure(0.6 + 1.65 * len(bars), len(bars), 2)
    for row, (contest, figures) in enumerate(bars):
        shown = {name: found for name, found in figures.items() if "prompt" in found}
        colors = [plots.COLORS[0] if name == contest.names[0] else plots.COLORS[-1] for name in shown]
        for column, (key, title) in enumerate((("prompt", "prompt"), ("decode", "answer"))):
            axis = axes[row][column]
            drawn = axis.barh(list(shown), [found[key] for found in shown.values()], color=colors)
            axis.bar_label(drawn, fmt="%.1f", padding=3)
            axis.margins(x=0.2)
            axis.invert_yaxis()
            axis.set_title(f"{title}, tokens/s\n{contest.title}, {contest.layers} layers", fontsize=9)
    plots.save(made, path)


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.throughput")
