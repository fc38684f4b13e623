"""Scores over checkpoints: their steps, and the picture of the curve."""

import re
from collections.abc import Sequence
from pathlib import Path

from minicpm_data.plots import figure, save


def steps(names: Sequence[str]) -> list[int] | None:
    """The last number in each name; None where one has none, or two have the same."""
    found = [re.findall("[0-9]+", name) for name in names]
    numbers = [int(digits[-1]) for digits in found if digits]
    return numbers if len(set(numbers)) == len(names) else None


def draw(picture: Path, values: dict[str, float], label: str) -> None:
    """``values`` by checkpoint, over the step in its name or else in the order of the run."""
    made, axes = figure()
    if (numbers := steps(list(values))) is not None:
        axes.plot(*zip(*sorted(zip(numbers, values.values(), strict=True)), strict=True), "o-")
        axes.set_xlabel("step")
    else:
        axes.plot(range(len(values)), list(values.values()), "o-")
        axes.set_xticks(range(len(values)), list(values), rotation=30, ha="right")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    save(made, picture)
