"""The training loop of fine-tuning and pretraining. It drives a backend's `Trainer` with the batches of a `Source`.

The data, the learning rate and the dropout of a step are functions of the step number. A resumed run therefore only
needs the weights, the optimizer state and the number.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, SupportsFloat

from weights_io.errors import InputError
from weights_io.progress import doing, ticking, waiting

if TYPE_CHECKING:
    import numpy as np

    from minicpm_data.metrics import Metrics
    from minicpm_data.training.processes import Interrupt, SingleProcess

Arrays = Mapping[str, "np.ndarray"]  # the arrays of one batch, by name
Figures = Mapping[str, SupportsFloat]  # metrics, which the device may still be computing
SHOWN = 12  # token ids that the message of a non-finite loss quotes


class Count(NamedTuple):
    """The number of tokens of a step, over all processes."""

    tokens: int
    trained: int  # those that are targets


class Trainer(Protocol):
    """The interface of a backend's trainer."""

    processes: "SingleProcess"

    def local_rows(self, rows: int) -> Sequence[int]:
        """The indices of the batch rows, of ``rows`` in all, that this process makes."""

    def step(self, batches: Sequence[Arrays], rate: float, number: int) -> Figures:
        """Take one optimizer step.

        Arguments:
            batches: the micro-batches, of ids and, in fine-tuning, labels and segments.
            rate: the learning rate.
            number: the step, from 0.

        Returns:
            The metrics, with at least ``loss`` and ``gradient_norm``.
        """

    def evaluate(self, batch: Arrays) -> Figures:
        """The objective's sums over a batch, and ``weight``, their divisor. Without ``weight`` they are means."""

    def peak_memory(self) -> int:
        """Most bytes that the device held so far."""

    def save(self, step: int) -> None:
        """Save a checkpoint atomically."""

    def restore(self) -> int:
        """Load the latest checkpoint, and return its step; 0 where there is none."""

    def export(self) -> None:
        """Write the adapter or the finished model. In pretraining no step may follow."""

    def close(self) -> None:
        """Release the resources. No call may follow."""


class Source(Protocol):
    """Where the batches of a run come from."""

    def batches(self, step: int) -> tuple[Sequence[Arrays], "Count"]:
        """The micro-batches of a step (from 0), and the number of their tokens."""

    def figures(self, step: int) -> Mapping[str, Any]:
        """The data's part of a metrics record, such as the epoch, after a step (from 1)."""

    def evaluation(self) -> Mapping[str, float]:
        """The validation losses, by name."""

    def first_ids(self, step: int) -> Sequence[int]:
        """The token ids of the first row of a step (from 0)."""


@dataclass(frozen=True)
class Plan:
    """The length of a run, and the steps after which it reports, evaluates and saves."""

    out: Path  # the run's folder
    steps: int
    schedule: Callable[[int], float]  # step -> learning rate
    save_every: int
    report_every: int
    evaluate_every: int | None  # None: there is no validation data
    also: tuple[int, ...] = ()  # more steps that are reported and evaluated
    record_all: bool = True  # metrics.jsonl gets every step, not only the reported ones
    export_saved: bool = False  # export at every checkpoint, not only at the end
    first: int = 0  # the step at which a new run starts
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
    """Restore the latest checkpoint, if any, and return the step to continue from."""
    step = trainer.restore() or plan.first
    if step:
        print(f"resuming after step {step}")
    return step


def fit(plan: Plan, trainer: Trainer, source: Source, step: int) -> None:
    """Train from a `restored` step to the end, and export the result.

    Arguments:
        plan: the plan of the run.
        trainer: the backend's.
        source: the batches.
        step: from `restored`.

    Raises:
        KeyboardInterrupt: Ctrl-C; the current step was completed and saved.
        InputError: the loss or the gradient norm is not finite.
    """
    from minicpm_data.metrics import Metrics
    from minicpm_data.training.processes import Interrupt

    first, out = trainer.processes.first, plan.out
    metrics = Metrics(out / "metrics.jsonl", step, plan.report_to, plan.project_name, first)
    with contextlib.closing(metrics), Interrupt() as interrupt:
        step = _train(plan, trainer, source, metrics, interrupt, step)
        if step >= plan.steps:  # also where a run was killed between its last checkpoint and the export
            trainer.export()
    if step < plan.steps:
        print(f"stopped after step {step} of {plan.steps}; the same command with --resume goes on from there.")
        raise KeyboardInterrupt
    with waiting("drawing the loss curve"):
        trainer.processes.on_main_process(lambda: metrics.draw(out / "loss.png", **plan.curve))
    print(f"finished: {out}, loss curve in {out / 'loss.png'}")


def _train(plan: Plan, trainer: Trainer, source: Source, metrics: "Metrics", interrupt: "Interrupt", step: int) -> int:
    """Train from ``step`` on, and return the number of completed steps."""
    from tqdm import tqdm

    processes, recent = trainer.processes, _Recent(plan, trainer, source, metrics)
    stopping, begun = False, step
    with (
        tqdm(total=plan.steps, initial=step, unit="step", dynamic_ncols=True, disable=processes.quiet) as bar,
        contextlib.nullcontext() if bar.disable else ticking(bar),
    ):
        while step < plan.steps and not stopping:
            batches, count = source.batches(step)
            rate = plan.schedule(step)
            with doing(bar, "compiling the step") if step == begun else contextlib.nullcontext():
                figures = trainer.step(batches, rate, step)
            recent.wait()  # at most one step is queued behind the running one
            step += 1
            recent.add({"step": step, **source.figures(step), "learning_rate": rate, **figures}, count)
            bar.update()
            stopping = processes.any(interrupt.wanted)  # read once, so that the last step is saved
            reporting, saving = plan.reports(step), plan.saves(step) or stopping
            if reporting or saving:
                evaluating = plan.evaluates(step)
                with doing(bar, "evaluating") if evaluating else contextlib.nullcontext():
                    last = recent.flush(source.evaluation if evaluating else dict, reporting)
                bar.set_postfix(loss=f"{last['loss']:.3f}", tokens_s=f"{last['tokens_per_second']:,.0f}")
                if reporting:
                    bar.write(line(last | {"loss": recent.mean_loss()}))
                recent.restart()
            if saving:
                trainer.save(step)
                if plan.export_saved and step < plan.steps:
                    trainer.export()
    return step


class _Recent:
    """The records of the steps since the last report. Their metrics may still be computing on the device."""

    def __init__(self, plan: Plan, trainer: Trainer, source: Source, metrics: "Metrics"):
        self._plan, self._trainer, self._source, self._metrics = plan, trainer, source, metrics
        self._records: list[dict[str, Any]] = []
        self._losses: list[float] = []  # of the steps since the last report
        self._trained = metrics.last("trained_tokens")  # of the whole run, also where it is resumed
        self.restart()

    def restart(self) -> None:
        """Start counting time and tokens."""
        self._began, self._tokens, self._steps = time.perf_counter(), 0, 0

    def add(self, record: dict[str, Any], count: Count) -> None:
        self._trained += count.trained
        # The ``tokens`` of pretraining follow from the step. A resumed run finds the last of its few records.
        self._records.append({"trained_tokens": record.get("tokens", self._trained)} | record)
        self._tokens += count.tokens
        self._steps += 1

    def wait(self) -> None:
        """Wait until the device has computed the metrics."""
        if self._records:
            float(self._records[-1]["loss"])

    def flush(self, evaluation: Callable[[], Mapping[str, float]], reporting: bool) -> dict[str, Any]:
        """Write the records, and return the last one, to which the results of ``evaluation`` are added."""
        self.wait()
        last = self._records[-1]
        taken = time.perf_counter() - self._began
        last |= {"iterations_per_second": self._steps / taken, "tokens_per_second": self._tokens / taken}
        last["peak_memory"] = self._trainer.peak_memory() / 1e9
        began = time.perf_counter()
        if found := evaluation():
            last |= {**found, "valid_seconds": time.perf_counter() - began}
        for record in self._records:
            # Convert the device's arrays, which are computed by now.
            record |= {name: x if isinstance(x, str | int) else float(x) for name, x in record.items()}
            self._check(record)
            self._losses.append(record["loss"])
            if self._plan.record_all or (reporting and record is last):
                self._metrics.write(record)
        self._records = []
        return last

    def mean_loss(self) -> float:
        """The mean loss of the steps since the last call, which mlx_lm prints."""
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses)

    def _check(self, record: Mapping[str, Any]) -> None:
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(record[name]):
                ids = " ".join(map(str, self._source.first_ids(record["step"] - 1)[:SHOWN]))
                raise InputError(
                    f"the {name.replace('_', ' ')} of step {record['step']} is {record[name]} (its first example "
                    f"begins with ids {ids}); earlier checkpoints are kept: --resume with a lower --learning-rate, or "
                    "correct the data and start a new run."
                )


def line(record: Mapping[str, Any]) -> str:
    """A record as one or two lines for the terminal, in the format of mlx_lm. With several validation losses, the one
    of the record's stage is shown."""
    step = f"Iter {record['step']}: "
    parts = [f"{step}Train loss {record['loss']:.3f}"]
    if "accuracy" in record:
        parts.append(f"preferred {record['accuracy']:.1%}")
    parts += [
        f"Learning Rate {record['learning_rate']:.3e}",
        f"It/sec {record['iterations_per_second']:.3f}",
        f"Tokens/sec {record['tokens_per_second']:,.0f}",
        f"Trained Tokens {record['trained_tokens']:,}",
        f"Peak mem {record['peak_memory']:.3f} GB",
    ]
    valid = record.get("valid_loss", record.get(f"{record.get('stage')}_valid_loss"))
    first = "" if valid is None else f"{step}Val loss {valid:.3f}, Val took {record['valid_seconds']:.3f}s\n"
    return first + ", ".join(parts)


def means(trainer: Trainer, batches: Iterable[Arrays], limit: int | None, precision: type) -> dict[str, float]:
    """The means of the objective over at most ``limit`` batches (None: all).

    ``precision``: the numpy type of the sums.
    """
    sums: dict[str, Any] = {}
    count = 0
    for batch in itertools.islice(batches, limit):
        count += 1
        for name, value in trainer.evaluate(batch).items():
            sums[name] = sums.get(name, precision(0)) + precision(float(value))
    weight = max(sums.pop("weight", precision(count)), precision(1))
    return {name: float(value / weight) for name, value in sums.items()}
