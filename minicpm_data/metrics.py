"""The metrics of a training run: ``metrics.jsonl``, one JSON object per line, and the loss curve as a picture."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minicpm_data.plots import figure, save
from weights_io.errors import InputError, listed
from weights_io.files.partial import write_whole
from weights_io.files.regular import read_regular

MAX_BYTES = 2**28  # enough for a run of a million steps


class Metrics:
    """The metrics of a run by step. A run that resumes after step ``start`` drops all later records."""

    def __init__(
        self,
        path: Path,
        start: int = 0,
        report_to: str | None = None,
        project_name: str | None = None,
        writing: bool = True,
    ):
        """
        Arguments:
            path: the ``metrics.jsonl`` of the run.
            start: the step after which the run resumes; 0 for a new run.
            report_to: ``wandb`` or ``tensorboard``, which also gets every record; see `check_reporter`.
            project_name: the name of the project in wandb.
            writing: True in process 0. The other processes write nothing.
        """
        self.path, self._writing = path, writing
        check_reporter(report_to)
        self._also = REPORTERS[report_to if writing else None](path.parent, project_name, start)
        if writing:
            self.records = _until(start, read_records(path)) if path.exists() else []
            write_whole(path, "".join(json.dumps(record) + "\n" for record in self.records))

    def last(self, name: str) -> Any:
        """The figure ``name`` of the last record; 0 where there is none."""
        return self.records[-1].get(name, 0) if self._writing and self.records else 0

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
        """Plot the losses and the learning rate.

        Arguments:
            picture: the PNG file to write.
            decay_at: tokens or steps at which the decay starts; a vertical line marks it.
            by: the x axis, ``tokens`` or ``step``.
        """
        from matplotlib.ticker import NullFormatter

        unit, axis = (1e6, "million tokens") if by == "tokens" else (1, "steps")
        drawn = [r for r in self.records if all(_is_number(r.get(key)) for key in (by, "loss", "learning_rate"))]
        at = [r[by] / unit for r in drawn]
        made, axes = figure()
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
        # Over several decades the labels between the powers of ten would overlap.
        axes.yaxis.set_minor_formatter((lambda value, _: f"{value:g}") if high < 30 * low else NullFormatter())
        rates = axes.twinx()
        rates.plot(at, [r["learning_rate"] for r in drawn], color="tab:red", lw=0.8, alpha=0.5)
        rates.set_ylabel("learning rate", color="tab:red")
        rates.set_ylim(bottom=0)
        made.legend(loc="outside lower center", ncols=3, frameon=False)
        save(made, picture)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a ``.jsonl`` file.

    A killed process may leave the last line incomplete; that line is skipped. Other damaged lines are skipped with a
    note.
    """
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
    """The records up to step ``start``, one per step, in order."""
    steps = {r["step"]: r for r in records if type(r.get("step")) is int and r["step"] <= start}
    return [steps[step] for step in sorted(steps)]


def _is_number(value: Any) -> bool:
    """Whether a value can be plotted. The file may hold any value."""
    return type(value) in (int, float) and abs(value) < 1e300


class _Reporter:
    """A destination of records besides the file. This one drops them."""

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
    """Raises `InputError` where the package of a reporter is not installed."""
    if report_to is not None and find_spec(PACKAGES[report_to]) is None:
        raise InputError(
            f"{report_to} needs a package that is not installed: pip install {PACKAGES[report_to]}.", option="report_to"
        )
