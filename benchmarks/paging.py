"""How many requests the engine's scheduler decodes at once in a pool of pages, and how often it interrupts one.

    python -m benchmarks.paging --model minicpm-2b --plot paging.png

The scheduler is the engine's own; no model runs. Prompts and answers have lognormal lengths: of a prompt the median is
159 tokens and the 99th percentile 1,028, of an answer 199 and 1,076, both at most 4,096. All requests wait at the
start. The bound on tokens/s reads the weights and the held pages once per step, at 85 % of the chip's bandwidth.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from minicpm_data.generation import engine
from minicpm_data.generation.pages import PagePool
from minicpm_data.generation.request import GenerationRequest, PromptIds
from minicpm_data.generation.request_state import RequestState
from weights_io import command_line

CONTEXT = 4096
PROMPT, ANSWER = (159, 0.80), (199, 0.726)  # median, sigma of the logarithm
EFFICIENCY = 0.85  # of the bandwidth
RESERVED = 350_000_000  # bytes of a chip for programs and activations


@dataclass(frozen=True)
class Options:
    model: str = "minicpm-2b"
    """Model of the catalogue, in bfloat16."""
    chip: str = "v5e"
    """Chip whose memory holds the weights and the pages."""
    kv_bits: int | None = None
    """8: an int8 cache."""
    at_once: tuple[int, ...] = (16, 32, 64, 128)
    """Places in the batch."""
    requests: int = 600
    """Requests."""
    seed: int = 0
    """Seed of the lengths."""
    plot: Path | None = None
    """Picture to write."""


class Scheduler(engine.BatchEngine[Any]):
    """The engine's scheduler over a pool, without a model: tokens are random numbers."""

    def __init__(self, slots: int, pool: PagePool):
        config = SimpleNamespace(max_position_embeddings=CONTEXT, rope_scaling=None)
        super().__init__(SimpleNamespace(adapters=(), config=config), slots)
        self.pool, self._random = pool, np.random.default_rng(0)
        self.computed = 0  # tokens of prompts, again after an interruption

    def _run(self, state: RequestState) -> Iterator[int | None]:
        self.computed += len(state.text)
        yield int(self._random.integers(1 << 30))

    def _decode(self, steps: int) -> list[tuple[int, int]]:
        numbers = list(self.running)
        return list(zip(numbers, self._random.integers(1 << 30, size=len(numbers)).tolist(), strict=True))

    def _vacate(self, state: RequestState, again: bool) -> None:
        pass


def lengths(count: int, median_and_sigma: tuple[float, float], random: np.random.Generator) -> list[int]:
    """Lognormal lengths of at least 1."""
    median, sigma = median_and_sigma
    found = np.exp(np.log(median) + sigma * random.standard_normal(count))
    return np.clip(found, 1, CONTEXT // 2).astype(int).tolist()


def simulate(slots: int, pool: PagePool, count: int, seed: int) -> dict[str, float]:
    """Run all requests.

    Returns:
        The mean numbers of running requests and of held pages while requests waited, interruptions per request, the
        tokens of prompts that were computed per token of a prompt, and the steps that the slowest request waited.
    """
    random = np.random.default_rng(seed)
    scheduler = Scheduler(slots, pool)
    asks = zip(lengths(count, PROMPT, random), lengths(count, ANSWER, random), strict=True)
    prompts = 0
    for prompt, answer in asks:
        prompts += prompt
        ids = PromptIds(random.integers(1 << 30, size=prompt).tolist(), 1 << 30)
        scheduler.add(GenerationRequest((ids,), answer))
    running: list[int] = []
    held: list[int] = []
    began: dict[int, int] = {}  # request -> step at which it first ran
    step = waited = 0
    while not scheduler.idle:
        scheduler.step()
        step += 1
        for number in scheduler.running:
            began.setdefault(number, step)
        if scheduler.queued:
            running.append(len(scheduler.running))
            held.append(pool.pages - 1 - pool.available)
            waited = max(
                waited, *(step - began[state.number] for state in scheduler.queued if state.number in began), 0
            )
    steady = slice(len(running) // 4, None)
    return {
        "running": float(np.mean(running[steady] or [len(scheduler.running)])),
        "held": float(np.mean(held[steady] or [0])),
        "interruptions": scheduler.preemptions / count,
        "computed": scheduler.computed / prompts,
        "waited": waited,
    }


def main(options: Options) -> None:
    """Simulate the scheduler with several numbers of places."""
    from minicpm_jax.aot.programs import config_of
    from minicpm_jax.parallel.chips import CHIPS
    from weights_io.memory import cache_bytes
    from weights_io.parameters import count

    config, chip = config_of(options.model), CHIPS[options.chip]
    weights = 2 * count(config)
    kind = "int8" if options.kv_bits == 8 else "bfloat16"
    token = cache_bytes(config, 1, kind)
    page = 128 if options.kv_bits == 8 else 32
    while page * token // config.num_hidden_layers // 2 < 65536 and options.kv_bits is None:
        page *= 2
    tokens = (chip.hbm - weights - RESERVED) // token
    rows = max(1, tokens // CONTEXT)
    print(f"{options.model} on {options.chip}: {tokens:,} tokens in pages of {page}, or {rows} rows of {CONTEXT}\n")
    print("| places | at once | interruptions a request | prompt tokens computed | bound on tokens/s |")
    print("|---|---|---|---|---|")
    found = []
    for slots in (rows, *options.at_once):
        result = simulate(slots, PagePool(tokens // page + 1, page), options.requests, options.seed)
        seconds = (weights + result["held"] * page * token) / (EFFICIENCY * chip.bandwidth)
        found.append((slots, result["running"], result["running"] / seconds))
        print(
            f"| {slots} | {result['running']:.1f} | {result['interruptions']:.3f} | {result['computed']:.2f} | "
            f"{result['running'] / seconds:,.0f} |"
        )
    if options.plot is not None:
        draw(options.plot, options.model, found)


def draw(path: Path, model: str, found: list[tuple[int, float, float]]) -> None:
    """Bars of the requests at once and of the bound on tokens/s, by places in the batch; the first are whole rows."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    names = [f"{found[0][0]} rows", *(str(slots) for slots, *_ in found[1:])]
    for axis, place, title in zip(axes, (1, 2), ("requests at once", "bound on tokens/s"), strict=True):
        bars = axis.bar(names, [row[place] for row in found], color=["0.6"] + ["tab:blue"] * (len(found) - 1))
        axis.bar_label(bars, fmt="{:,.0f}")
        axis.margins(y=0.12)
        axis.set_title(f"{model}: {title}")
        axis.set_xlabel("places in the batch")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.paging")
