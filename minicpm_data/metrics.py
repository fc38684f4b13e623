"""What a training run writes down: ``metrics.jsonl``, one JSON object a line, and the picture of it."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from weights_io.errors import InputError, listed
from weights_io.files.partial import partial, write_whole
from weights_io.files.regular import read_regular

MAX_BYTES = 2**28  # of a run of a million steps


class Metrics:
    """A run's figures by step. One that resumes after step ``start`` drops what was written after it."""

    def __init__(
        self,
        path: Path,
        start: int = 0,
        report_to: str | None = None,
        project_name: str | None = None,
        writing: bool = True,
    ):
        """``report_to``: wandb (there under ``project_name``) or tensorboard get every record too; see
        `check_reporter`. Not ``writing``: what is written goes nowhere, as another process writes it."""
        self.path, self._writing = path, writing
        check_reporter(report_to)
        self._also = REPORTERS[report_to if writing else None](path.parent, project_name, start)
        if writing:
            self.records = _until(start, read_records(path)) if path.exists() else []
            write_whole(path, "".join(json.dumps(record) + "\n" for record in self.records))

    def write(self, record: dict[str, Any]) -> None:
        if not self._writing:
            return
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")  # one write to the disk
        self._also.log(record)

    def close(self) -> None:
        self._also.close()

    def draw(self, picture: Path, decay_at: float | None = None, by: str = "tokens") -> None:
        """Loss and learning rate against tokens or steps; a line at ``decay_at`` of them, where the decay begins."""
        from matplotlib.figure import Figure  # not pyplot, whose backend is a notebook's or a window's
        from matplotlib.ticker import NullFormatter

        unit, axis = (1e6, "million tokens") if by == "tokens" else (1, "steps")
        drawn = [r for r in self.records if all(_is_number(r.get(key)) for key in (by, "loss", "learning_rate"))]
        at = [r[by] / unit for r in drawn]
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(at, [r["loss"] for r in drawn], lw=0.8, alpha=0.6, label="training loss")
        valid: dict[str, list[tuple[float, float]]] = {}
        for record in drawn:
            for name in [key for key in record if key.endswith("valid_loss") and _is_number(record[key])]:
                valid.setdefault(name, []).append((record[by] / unit, record[name]))
        for name, points in valid.items():
            axes.plot(*zip(*points, strict=True), "o-", ms=2.5, lw=1, label=name.replace("_", " "))
        boundary = None if decay_at is None else decay_at / unit
        if boundary is not None:
            axes.axvline(boundary, color="grey", ls="--", lw=0.8)
            axes.annotate(
                "decay begins ", (boundary, axes.get_ylim()[1]), ha="right", va="top", rotation=90, fontsize=8
            )
        axes.set(xlabel=axis, ylabel="loss (nats)", yscale="log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        # Over several decades the labels between the powers of ten would lie on one another.
        axes.yaxis.set_minor_formatter((lambda value, _: f"{value:g}") if high < 30 * low else NullFormatter())
        rates = axes.twinx()
        rates.plot(at, [r["learning_rate"] for r in drawn], color="tab:red", lw=0.8, alpha=0.5)
        rates.set_ylabel("learning rate", color="tab:red")
        rates.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=3)
        with partial(picture) as path:
            figure.savefig(path, dpi=120, format="png")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``.jsonl`` file that were written whole. A last one that a killed process left without its end is
    left out in silence, others that are damaged with a note."""
    records, damaged = [], []
    lines = read_regular(path, MAX_BYTES).split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line and number < len(lines):
            damaged.append(number)
    if damaged:
        print(f"note: {path} is damaged in line {listed(damaged)}, which is left out", file=sys.stderr)
    return records


def _until(start: int, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a run up to a step, each step once, in order."""
    steps = {r["step"]: r for r in records if type(r.get("step")) is int and r["step"] <= start}
    return [steps[step] for step in sorted(steps)]


def _is_number(value: Any) -> bool:
    """Whether a figure can be drawn: a file that is read again may hold anything."""
    return type(value) in (int, float) and abs(value) < 1e300


class _Reporter:
    """Where records go besides the file: nowhere."""

    def __init__(self, folder: Path, project_name: str | None, start: int):
        pass

    def log(self, record: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class _Wandb(_Reporter):
    def __init__(self, folder: Path, project_name: str | None, start: int):
        import wandb

        self._run = wandb.init(project=project_name or folder.resolve().name, dir=str(folder), resume="allow")

    def log(self, record: dict[str, Any]) -> None:
        self._run.log(record, step=record["step"])

    def close(self) -> None:
        self._run.finish()


class _TensorBoard(_Reporter):
    def __init__(self, folder: Path, project_name: str | None, start: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

    def log(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


REPORTERS: dict[str | None, type[_Reporter]] = {None: _Reporter, "wandb": _Wandb, "tensorboard": _TensorBoard}
PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboardX"}


def check_reporter(report_to: str | None) -> None:
    """`InputError` where its package is not installed."""
    if report_to is not None and find_spec(PACKAGES[report_to]) is None:
        raise InputError(
            f"{report_to} needs a package that is not here: pip install {PACKAGES[report_to]}.", option="report_to"
        )
