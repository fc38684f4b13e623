"""Timing for the benchmarks: the variants alternate in every round, so that a busy moment affects all of them."""

import statistics
import time
from collections.abc import Callable, Mapping


def alternating(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant. A variant must return only when its result is computed. An extra first round
    warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, variant in variants.items():
            began = time.perf_counter()
            variant()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(runs[1:]) for name, runs in seconds.items()}
