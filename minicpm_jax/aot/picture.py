"""The picture of a program's memory on a chip: stacked bars beside the chip's HBM."""

from collections.abc import Sequence
from pathlib import Path

from minicpm_data.plots import stacked_bars
from minicpm_jax.aot.report import Report

GB = 10**9  # as the command prints sizes


def draw(path: Path, bars: Sequence[tuple[str, Report]]) -> None:
    """Draw the memory of programs. Writes a PNG file.

    Arguments:
        path: the file.
        bars: label and report of each program.
    """
    sizes = {label: {part: count / GB for part, count in parts(found).items()} for label, found in bars}
    stacked_bars(path, sizes, "GB on a chip", {label: found.hbm / GB for label, found in bars}, "HBM of the chip")


def parts(found: Report) -> dict[str, int]:
    """Part -> bytes on a chip. They sum up to ``needed``, if that is known."""
    named = {**found.held, "temporaries": found.temporaries}
    named["other inputs, results, program"] = max(0, found.needed - sum(named.values()))
    return {part: count for part, count in named.items() if count}
