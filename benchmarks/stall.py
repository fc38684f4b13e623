"""The longest pause in a running answer while strangers ask for what the server has not seen yet.

    python -m benchmarks.stall --backend jax

One answer streams all the time. Beside it one stranger after the other asks with a prompt of another length, a penalty,
sampling, or a long answer. The weights are random. Compiled programs of earlier runs are not used.
"""

import os
import tempfile
import threading
import time
import zlib
from dataclasses import dataclass
from typing import Any

from benchmarks.models import random_model, wide
from minicpm_serve.backends import BackendName
from weights_io import command_line

READ = 8  # tokens of each stranger's answer
Stranger = tuple[str, int, int, dict[str, Any]]  # what it asks, tokens of its prompt and answer, sampling


@dataclass(frozen=True)
class Options:
    backend: BackendName = "jax"
    """Backend to measure."""
    layers: int = 4
    """Layers of the model."""
    words: int = 16384
    """Vocabulary size."""
    prompts: tuple[int, ...] = (40, 200, 700)
    """Tokens of the strangers' prompts."""
    quiet: float = 5.0
    """Seconds that are measured before the strangers."""


def main(options: Options) -> None:
    """Time the pauses of a stream without strangers, and while each of them is answered."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        measure(options)


def measure(options: Options) -> None:
    from minicpm_serve.engine import ServingEngine

    _, model = random_model(options.backend, wide(options.layers, options.words, max_position_embeddings=4096))
    began = time.perf_counter()
    engine = ServingEngine(options.backend, model, None, 4)
    engine.warm_up()
    print(f"ready after {time.perf_counter() - began:.1f} s\n", flush=True)
    times: list[float] = []
    tokens: list[int] = []
    over = threading.Event()

    def stream() -> None:
        while not over.is_set():
            for response in engine.stream_generate([1, 5, 9], 1000):
                times.append(time.perf_counter())
                tokens.append(response.token or 0)
                if over.is_set():
                    break

    streaming = threading.Thread(target=stream)
    streaming.start()
    print("| stranger | its first token | pauses of the stream: longest | median |\n|---|---|---|---|")
    time.sleep(options.quiet)
    report("nobody", None, times, 0)
    for name, length, most, sampling in strangers(options.prompts):
        first, since = None, len(times)
        began = time.perf_counter()
        answer = engine.stream_generate([7 + i % 1000 for i in range(length)], most, **sampling)
        for _ in zip(range(READ), answer, strict=False):  # then it is cancelled
            first = first or time.perf_counter() - began
        report(name, first, times, max(since - 1, 0))
    over.set()
    streaming.join()
    engine.close()
    print(f"\nchecksum of the stream's first 200 tokens: {zlib.crc32(bytes(str(tokens[:200]), 'ascii')):08x}")


def strangers(prompts: tuple[int, ...]) -> list[Stranger]:
    lengths: list[Stranger] = [(f"a prompt of {length} tokens", length, READ, {}) for length in prompts]
    return [
        *lengths,
        ("a repetition penalty", 20, READ, {"repetition_penalty": 1.3}),
        ("temperature and top-p", 20, READ, {"temperature": 0.8, "top_p": 0.9, "seed": 1}),
        ("room for 3,000 tokens", 20, 3000, {}),
    ]


def report(name: str, first: float | None, times: list[float], since: int) -> None:
    seen = times[since:]
    pauses = sorted(b - a for a, b in zip(seen, seen[1:], strict=False))
    own = "" if first is None else f"{first:.2f} s"
    print(f"| {name} | {own} | {pauses[-1]:.2f} s | {pauses[len(pauses) // 2]:.3f} s |", flush=True)


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.stall")
