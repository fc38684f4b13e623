"""Pictures of results, in one style: bars, stacked bars and heat maps, dark on light, as PNG files.

Matplotlib is imported when a picture is drawn.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weights_io.files.partial import partial

# Colors that people with color blindness can tell apart (Okabe and Ito, 2008).
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")
WIDTH = 8.0  # inches, at DPI the 960 pixels of a README's column
DPI = 120
Table = Mapping[str, Mapping[str, float]]  # bar -> part or series -> value


def figure(height: float = 4.5, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of README width, and its axes (an array [rows, columns] where there are several).

    Not by pyplot, whose backend may be a notebook or a window.
    """
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    axes = made.subplots(rows, columns, squeeze=rows * columns == 1)
    for each in made.axes:
        each.spines[["top", "right"]].set_visible(False)
    return made, axes


def save(made: Any, path: Path) -> None:
    """Write a figure as a PNG file."""
    with partial(path.expanduser()) as unfinished:
        made.savefig(unfinished, dpi=DPI, format="png")


def stacked_bars(
    path: Path, bars: Table, unit: str, limits: Mapping[str, float] | None = None, limit_name: str = ""
) -> None:
    """Draw a horizontal bar of parts for each entry of ``bars``.

    Arguments:
        path: the PNG file.
        bars: label -> part -> size. The parts are drawn in the order in which they first occur.
        unit: the label of the axis of sizes.
        limits: label -> the size that a bar must not pass, drawn as a line.
        limit_name: what the limit is, for the legend.
    """
    made, axes = figure(1.9 + 0.6 * len(bars))
    labels, limits = list(bars), limits or {}
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    places = range(len(labels))
    left = [0.0] * len(labels)
    for part, color in zip(parts, _colors(len(parts)), strict=True):
        sizes = [bars[label].get(part, 0.0) for label in labels]
        axes.barh(places, sizes, 0.6, left=left, label=part, color=color, edgecolor="white", linewidth=0.5)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for place, label in enumerate(labels):
        if label in limits:
            named = {"label": limit_name} if place == 0 else {}
            axes.plot([limits[label]] * 2, [place - 0.42, place + 0.42], color="black", lw=2.5, **named)
    most = max([*left, *limits.values()], default=1.0)
    for place, total in enumerate(left):
        limit = limits.get(labels[place])
        text, beside = (f"{total:.3g}", total) if limit is None else (f"{total:.3g} of {limit:.3g}", max(total, limit))
        axes.annotate(text, (beside, place), va="center", xytext=(8, 0), textcoords="offset points")
    axes.set(xlim=(0, 1.25 * most), xlabel=unit)
    axes.set_yticks(places, [_folded(label) for label in labels])
    axes.invert_yaxis()
    made.legend(loc="outside lower center", ncols=min(4, len(parts) + bool(limits)), frameon=False)
    save(made, path)


def grouped_bars(path: Path, bars: Table, label: str, most: float | None = None, form: str = "{:.3g}") -> None:
    """Draw a group of vertical bars, one for each series, for each entry of ``bars``.

    Arguments:
        path: the PNG file.
        bars: group -> series -> value.
        label: the label of the axis of values.
        most: the end of that axis.
        form: how the value above a bar is written.
    """
    made, axes = figure()
    series = list(dict.fromkeys(name for group in bars.values() for name in group))
    width = 0.8 / max(1, len(series))
    for number, (name, color) in enumerate(zip(series, _colors(len(series)), strict=True)):
        there = [(place, group[name]) for place, group in enumerate(bars.values()) if name in group]
        at = [place + (number - (len(series) - 1) / 2) * width for place, _ in there]
        drawn = axes.bar(at, [value for _, value in there], 0.92 * width, label=name, color=color)
        axes.bar_label(drawn, [form.format(value) for _, value in there], padding=2, fontsize=9)
    axes.set_xticks(range(len(bars)), [_folded(group, 16) for group in bars])
    axes.set_ylabel(label)
    axes.margins(y=0.12)
    if most is not None:
        axes.set_ylim(0, 1.08 * most)
    if len(series) > 1:
        made.legend(loc="outside lower center", ncols=min(3, len(series)), frameon=False)
    save(made, path)


def heat_map(
    path: Path,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    row_label: str,
    column_label: str,
    title: str,
) -> None:
    """Draw a map of shares from 0 (red) to 1 (green), with the percentage in each cell.

    Arguments:
        path: the PNG file.
        values: [rows, columns]; None leaves a cell gray.
        rows, columns: the names of the rows and columns.
        row_label, column_label: the labels of the axes.
        title: what stands above the map.
    """
    import numpy as np

    made, axes = figure(1.6 + 0.38 * len(rows))
    axes.set_facecolor("#dddddd")  # seen where a cell is masked
    shares = np.array([[np.nan if value is None else value for value in row] for row in values], float)
    image = axes.imshow(np.ma.masked_invalid(shares), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            dark = 0.2 < share < 0.8  # the ends of the map are dark, its middle is light
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color="black" if dark else "white")
    axes.set_xticks(range(len(columns)), columns, rotation=0 if len(columns) < 9 else 45)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=column_label, ylabel=row_label, title=title)
    made.colorbar(image, ax=axes, label="found", format=lambda share, _: f"{100 * share:.0f} %")
    save(made, path)


def _colors(count: int) -> list[str]:
    return [COLORS[number % len(COLORS)] for number in range(count)]


def _folded(label: str, width: int = 30) -> str:
    return "\n".join(textwrap.wrap(label, width, break_on_hyphens=False))
