"""Tokens per second of 1, 4 and 16 concurrent requests in one engine, compared with a single request without it.

    python -m benchmarks.concurrency --backend jax

The weights are random. Every answer must equal the answer of the same request run alone; otherwise the command fails.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.models import random_model, wide
from benchmarks.timing import alternating
from minicpm_data.generation.engine import BatchEngine
from minicpm_data.generation.request import GenerationRequest
from minicpm_serve.backends import BackendName
from weights_io import command_line
from weights_io.errors import InputError


@dataclass(frozen=True)
class Options:
    backend: BackendName = "jax"
    """Backend to measure."""
    layers: int = 8
    """Layers of the model."""
    words: int = 16384
    """Vocabulary size."""
    prompt: int = 32
    """Tokens of the longest prompt. The others are a little shorter."""
    tokens: int = 48
    """Tokens of an answer."""
    at_once: tuple[int, ...] = (1, 4, 16)
    """Numbers of concurrent requests."""
    rounds: int = 5
    """Timed runs. The median is reported."""


def main(options: Options) -> None:
    """Time plain decoding of one request, and an engine with one slot per request, in turn."""
    backend, model = random_model(options.backend, wide(options.layers, options.words))
    random = np.random.default_rng(0)
    prompts = [
        random.integers(3, options.words, options.prompt - index % 8).tolist() for index in range(max(options.at_once))
    ]
    made: dict[int, list[list[int]]] = {}

    def alone(prompt: list[int]) -> list[int]:
        run = backend.generator.stream_generate(model, None, prompt, options.tokens)
        return [response.token for response in run if response.token is not None]

    def together(count: int) -> None:
        engine = backend.generator.decoding.engine(model, count)
        made[count] = answers(engine, prompts[:count], options.tokens)

    expected = [alone(prompt) for prompt in prompts]
    calls: dict[str, Any] = {"plain": functools.partial(alone, prompts[0])}
    calls |= {str(count): functools.partial(together, count) for count in options.at_once}
    seconds = alternating(calls, options.rounds)
    for count, found in made.items():
        if found != expected[:count]:
            raise InputError(f"of {count} requests at once one got other tokens than by itself.")
    print("| requests | way | tokens/s | of plain decoding |\n|---|---|---|---|")
    speed = options.tokens / seconds["plain"]
    print(f"| 1 | plain | {speed:.1f} | 1.00 |")
    for count in options.at_once:
        shared = count * options.tokens / seconds[str(count)]
        print(f"| {count} | engine | {shared:.1f} | {shared / speed:.2f} |")


def answers(engine: BatchEngine, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    numbers = [engine.add(GenerationRequest.of(engine.model, None, [prompt], tokens)) for prompt in prompts]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    while not engine.idle:
        for made in engine.step():
            found[made.number].append(made.token)
    return [found[number] for number in numbers]


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.concurrency")
