"""The training loop, round the `Trainer` of a backend and a `Source` of batches: fine-tuning and pretraining.

The order of the data, the learning rate and the dropout of a step follow from its number, so that weights, moments and
the number are all that a resumed run needs.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat

from weights_io.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from minicpm_data.metrics import Metrics
    from minicpm_data.training.processes import Interrupt, SingleProcess

Arrays = Mapping[str, "np.ndarray"]  # of one batch, by name
Figures = Mapping[str, SupportsFloat]  # which may still be computed
SHOWN = 12  # ids of a step after which nothing is worth keeping


class Trainer(Protocol):
    """What a backend does for the loop."""

    processes: "SingleProcess"

    def local_rows(self, rows: int) -> Sequence[int]:
        """Which of a batch's ``rows`` this process makes."""

    def step(self, batches: Sequence[Arrays], rate: float, number: int) -> Figures:
        """One optimizer step on batches of ids (and labels and segments); its figures."""

    def evaluate(self, batch: Arrays) -> Figures:
        """The objective's sums over a batch; ``weight`` is what they are divided by. Without one they are means."""

    def save(self, step: int) -> None:
        """Keep the state, whole or not at all."""

    def restore(self) -> int:
        """Take the last state that was kept; its step, 0 where there is none."""

    def export(self) -> None:
        """Write the adapter, or the model. Nothing of a pretraining is trained after it."""

    def close(self) -> None:
        """Nothing follows."""


class Source(Protocol):
    """Where the batches of a run come from."""

    def batches(self, step: int) -> tuple[Sequence[Arrays], int]:
        """Those of a step (from 0), and how many tokens all processes have in them."""

    def figures(self, step: int) -> Mapping[str, Any]:
        """What a record says of the data up to the end of a step (from 1)."""

    def evaluation(self) -> Mapping[str, float]:
        """Losses on data that is not trained on, by name."""

    def first_ids(self, step: int) -> Sequence[int]:
        """The token ids with which the data of a step (from 0) begins."""


@dataclass(frozen=True)
class Plan:
    """How long a run is, and after which of its steps what is done."""

    out: Path  # its folder
    steps: int
    schedule: Callable[[int], float]  # learning rate by step
    save_every: int
    report_every: int
    evaluate_every: int | None  # None: there is nothing to evaluate on
    also: tuple[int, ...] = ()  # further steps that are reported and evaluated
    record_all: bool = True  # metrics.jsonl gets every step, not only those that are reported
    export_saved: bool = False  # every state that is saved is exported too, not only the last
    first: int = 0  # the step with which a new run begins
    report_to: str | None = None
    project_name: str | None = None
    curve: Mapping[str, Any] = field(default_factory=dict)  # for `Metrics.draw`

    def reports(self, step: int) -> bool:
        return step % self.report_every == 0 or step in self.also or self.evaluates(step)

    def evaluates(self, step: int) -> bool:
        return self.evaluate_every is not None and (step % self.evaluate_every == 0 or step in self.also)

    def saves(self, step: int) -> bool:
        return step % self.save_every == 0 or step == self.steps


def restored(plan: Plan, trainer: Trainer) -> int:
    """The step from which the run goes on."""
    step = trainer.restore() or plan.first
    if step:
        print(f"going on after step {step}")
    return step


def fit(plan: Plan, trainer: Trainer, source: Source, step: int) -> None:
    """Train from a `restored` step to the export. Raises KeyboardInterrupt after a step that Ctrl-C has made the last
    one, and `InputError` after one whose loss is not finite."""
    from minicpm_data.metrics import Metrics
    from minicpm_data.training.processes import Interrupt

    first, out = trainer.processes.first, plan.out
    metrics = Metrics(out / "metrics.jsonl", step, plan.report_to, plan.project_name, first)
    with contextlib.closing(metrics), Interrupt() as interrupt:
        step = _train(plan, trainer, source, metrics, interrupt, step)
        if step >= plan.steps:  # also of a run that was killed between its last checkpoint and the export
            trainer.export()
    if step < plan.steps:
        print(f"stopped after step {step} of {plan.steps}; the same command with --resume goes on from there.")
        raise KeyboardInterrupt
    trainer.processes.on_main_process(lambda: metrics.draw(out / "loss.png", **plan.curve))
    print(f"finished: {out}, loss curve in {out / 'loss.png'}")


def _train(plan: Plan, trainer: Trainer, source: Source, metrics: "Metrics", interrupt: "Interrupt", step: int) -> int:
    """The steps from ``step`` on; the number of those that are done."""
    from tqdm import tqdm

    processes, recent = trainer.processes, _Recent(plan, source, metrics)
    stopping = False
    with tqdm(total=plan.steps, initial=step, unit="step", dynamic_ncols=True, disable=processes.quiet) as bar:
        while step < plan.steps and not stopping:
            batches, tokens = source.batches(step)
            rate = plan.schedule(step)
            figures = trainer.step(batches, rate, step)
            recent.wait()  # one step is queued behind the one that runs, not more
            step += 1
            recent.add({"step": step, **source.figures(step), "learning_rate": rate, **figures}, tokens)
            bar.update()
            stopping = processes.any(interrupt.wanted)  # read once: a step after which the loop ends is saved
            reporting, saving = plan.reports(step), plan.saves(step) or stopping
            if reporting or saving:
                last = recent.flush(source.evaluation if plan.evaluates(step) else dict, reporting)
                bar.set_postfix(loss=f"{last['loss']:.3f}", tokens_s=f"{last['tokens_per_second']:,.0f}")
                if reporting:
                    bar.write(line(last))
                recent.restart()
            if saving:
                trainer.save(step)
                if plan.export_saved and step < plan.steps:
                    trainer.export()
    return step


class _Recent:
    """The steps since the last report, whose figures nobody has looked at."""

    def __init__(self, plan: Plan, source: Source, metrics: "Metrics"):
        self._plan, self._source, self._metrics = plan, source, metrics
        self._records: list[dict[str, Any]] = []
        self.restart()

    def restart(self) -> None:
        """Count time and tokens from now on."""
        self._began, self._tokens = time.perf_counter(), 0

    def add(self, record: dict[str, Any], tokens: int) -> None:
        self._records.append(record)
        self._tokens += tokens

    def wait(self) -> None:
        """For the device to have computed them."""
        if self._records:
            float(self._records[-1]["loss"])

    def flush(self, evaluation: Callable[[], Mapping[str, float]], reporting: bool) -> dict[str, Any]:
        """Write them down, with the ``evaluation`` in the last one, which is returned."""
        self.wait()
        last = self._records[-1]
        last["tokens_per_second"] = self._tokens / (time.perf_counter() - self._began)
        last |= evaluation()
        for record in self._records:
            # What the device has made is a number by now.
            record |= {name: x if isinstance(x, str | int) else float(x) for name, x in record.items()}
            self._check(record)
            if self._plan.record_all or (reporting and record is last):
                self._metrics.write(record)
        self._records = []
        return last

    def _check(self, record: Mapping[str, Any]) -> None:
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(record[name]):
                ids = " ".join(map(str, self._source.first_ids(record["step"] - 1)[:SHOWN]))
                raise InputError(
                    f"the {name.replace('_', ' ')} of step {record['step']} is {record[name]} (its first example "
                    f"begins with ids {ids}); what was saved before is kept: --resume with a lower --learning-rate, or "
                    "mend the data and begin anew."
                )


def line(record: Mapping[str, Any]) -> str:
    """One step for the screen, in the words of mlx_lm. Of several losses on data that is not trained on, that of the
    stage is shown."""
    parts = [f"Iter {record['step']}: Train loss {record['loss']:.3f}"]
    if "accuracy" in record:
        parts.append(f"preferred {record['accuracy']:.1%}")
    valid = record.get("valid_loss", record.get(f"{record.get('stage')}_valid_loss"))
    if valid is not None:
        parts.append(f"Val loss {valid:.3f}")
    parts += [f"Learning rate {record['learning_rate']:.3e}", f"Tokens/sec {record['tokens_per_second']:,.0f}"]
    return ", ".join(parts)


def means(trainer: Trainer, batches: Iterable[Arrays], limit: int | None, precision: type) -> dict[str, float]:
    """The objective's means over at most ``limit`` batches (None: all). ``precision``: numpy's type in which they are
    added up."""
    sums: dict[str, Any] = {}
    count = 0
    for batch in itertools.islice(batches, limit):
        count += 1
        for name, value in trainer.evaluate(batch).items():
            sums[name] = sums.get(name, precision(0)) + precision(float(value))
    weight = max(sums.pop("weight", precision(count)), precision(1))
    return {name: float(value / weight) for name, value in sums.items()}
