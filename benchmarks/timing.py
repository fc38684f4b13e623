"""How the benchmarks time: every variant in turn, round after round, so that a busy moment meets all of them."""

import statistics
import time
from collections.abc import Callable, Mapping


def alternating(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant, whose call returns when its result is there. One round before warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, variant in variants.items():
            began = time.perf_counter()
            variant()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(runs[1:]) for name, runs in seconds.items()}
