"""Measure the memory of a long random prompt, in a float32 model with 4 layers of MiniCPM-2B's width.

    python -m benchmarks.prompt_memory --backend jax --tokens 2048 8192 16384 32768

Each length runs in a process of its own. The measured value is the process's peak resident memory, minus its memory
after loading the weights. The predicted value is the cache: 4 layers x 2 x 2304 numbers x 4 bytes per token. The
difference between the two should not grow with the length.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.models import shape_of
from weights_io import command_line
from weights_io.config import ModelConfig
from weights_io.errors import InputError

# The weights are small, and a token takes a tenth of the 2B's cache memory.
CONFIG = ModelConfig.from_dict(
    shape_of("minicpm-2b") | {"vocab_size": 2048, "num_hidden_layers": 4, "max_position_embeddings": 65536}
)
BYTES_A_TOKEN = CONFIG.num_hidden_layers * 2 * CONFIG.num_key_value_heads * CONFIG.head_dim * 4


@dataclass(frozen=True)
class Options:
    backend: Literal["jax", "mlx"] = "jax"
    """Backend to measure."""
    tokens: tuple[int, ...] = (2048, 8192, 16384)
    """Prompt lengths in tokens."""
    prefill_step_size: int = 512
    """Chunk size in tokens. A smaller chunk shows the growth of the cache with fewer tokens."""
    here: bool = False
    """Run one length in this process, and print the bytes and the seconds."""


def main(options: Options) -> None:
    """Measure the memory that prompts of several lengths need in addition to the weights."""
    if not Path("/proc/self/clear_refs").exists():
        raise InputError("the peak of a process is read from /proc, which this system has not; run it on Linux.")
    if options.here:
        print(*run(options.backend, options.tokens[0], options.prefill_step_size))
        return
    print("| tokens | cache, predicted | peak beyond the weights | more than the cache | seconds |")
    print("|---|---|---|---|---|")
    for tokens in options.tokens:
        command = [sys.executable, "-m", "benchmarks.prompt_memory", "--here"]
        command += ["--backend", options.backend, "--tokens", str(tokens)]
        command += ["--prefill-step-size", str(options.prefill_step_size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        held, seconds = map(float, done.stdout.split())
        cache = tokens * BYTES_A_TOKEN
        figures = " | ".join(f"{figure / 1e6:,.0f} MB" for figure in (cache, held, held - cache))
        print(f"| {tokens:,} | {figures} | {seconds:,.0f} |", flush=True)


def run(backend: str, tokens: int, pieces: int) -> tuple[int, float]:
    """Bytes in addition to the weights, and seconds, for one prompt and the next token."""
    package = import_module(f"minicpm_{backend}")
    model = initialised(backend)
    prompt = np.random.default_rng(0).integers(0, CONFIG.vocab_size, tokens).tolist()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    held, began = resident("VmRSS"), time.perf_counter()
    for _ in package.stream_generate(model, None, prompt, max_tokens=1, prefill_step_size=pieces):
        pass
    return resident("VmHWM") - held, time.perf_counter() - began


def initialised(backend: str):
    """The model with random weights, all of them evaluated."""
    if backend == "jax":
        import jax

        from minicpm_jax.model import initialize

        return jax.block_until_ready(initialize(CONFIG, jax.random.key(0)))
    import mlx.core as mx

    from minicpm_mlx import model as mlx_model

    model = mlx_model.initialize(CONFIG, mx.random.key(0))
    mx.eval(model.parameters())
    mx.clear_cache()
    return model


def resident(name: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.prompt_memory")
