"""Fine-tuning, as both backends have it: the options, and the loop round a backend's `Trainer`.

The order of the data, the learning rate and the dropout of a step follow from its number, so that weights, moments and
the number are all that a resumed run needs.
"""

import contextlib
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from minicpm_data.generation.api import Backend
from minicpm_data.model_options import load_model, open_source
from minicpm_data.tokenizer.chat_template import PLAIN_TEMPLATE
from minicpm_data.training.options import FREE, FinetuneOptions, check, check_layers, schedule_of
from minicpm_data.training.processes import leaving_at_interrupts
from minicpm_data.training.yaml_config import flags_of_file
from weights_io import command_line
from weights_io.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from minicpm_data.datasets.batches import Batch, Batches
    from minicpm_data.datasets.examples import Own, Split
    from minicpm_data.training.processes import Alone
    from weights_io.checkpoint import Checkpoint


class Trainer(Protocol):
    """What a backend does for the loop. Made of ``(model, options, checkpoint)``."""

    processes: "Alone"

    def own(self, rows: int) -> "Sequence[int]":
        """Which of a batch's ``rows`` this process makes."""

    def row_width(self, length: int) -> int:
        """How wide rows are made that hold so many tokens."""

    def step(self, batches: "Sequence[Mapping[str, np.ndarray]]", rate: float, number: int) -> Mapping[str, Any]:
        """One optimiser step on batches of ids, labels and segments; its figures, which may still be computed."""

    def evaluate(self, batch: "Mapping[str, np.ndarray]") -> Mapping[str, Any]:
        """The objective's sums over a batch; ``weight`` is what they are divided by."""

    def reference(self, batch: "Mapping[str, np.ndarray]") -> "np.ndarray":
        """Log-probability of the trained tokens of every row (not only its own) under the model as it was before
        training."""

    def save(self, step: int) -> None:
        """Keep the state, whole or not at all."""

    def restore(self) -> int:
        """Take the last state that was kept; its step, 0 where there is none."""

    def export(self) -> None:
        """Write the adapter, or the model."""

    def load_export(self) -> None:
        """Take what `export` wrote."""

    def close(self) -> None:
        """Nothing follows."""


def run(
    backend: Callable[[], Backend],
    trainer: Callable[[Any, Any, "Checkpoint"], Trainer],
    options: type[FinetuneOptions],
    prog: str,
) -> None:
    """``python -m PACKAGE.lora`` and ``.finetune``; ``backend`` is called (imported) when the flags are right."""

    def main(options: FinetuneOptions) -> None:
        """Fine-tune a MiniCPM (or Llama) model on conversations, texts or preferences."""
        finetune(options, backend, trainer)

    def flags_of_config(given: FinetuneOptions) -> list[str]:
        return [] if given.config is None else flags_of_file(given.config, options)

    with leaving_at_interrupts():
        command_line.run(main, options, prog, flags_of_config)


def finetune(
    options: FinetuneOptions, backend: Callable[[], Backend], trainer: Callable[[Any, Any, "Checkpoint"], Trainer]
) -> None:
    """Train, and test, as the options say. Raises `InputError` for options, data or a run that cannot be used."""
    from minicpm_data.datasets.examples import load_split, show_first
    from minicpm_data.metrics import check_reporter
    from minicpm_data.training.run_folder import check_folder, using

    check(options)
    if options.training:
        check_folder(options.out, options.resume)
        check_reporter(options.report_to)
    running = backend()
    source = open_source(options)
    model, tokenizer = load_model(running, options, source=source)
    check_layers(options, model.config)
    if options.ignore_chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE

    def split(name: Any, required: bool) -> "Split | None":
        found = load_split(
            options.data,
            name,
            tokenizer,
            options.max_seq_length,
            pairs=options.loss != "sft",
            mask_prompt=not options.train_on_prompt,
            required=required,
            ignore_keys=options.ignore_keys,
            trusted=not options.special_tokens_as_text,
        )
        if found is not None:
            print(f"{name}: {found.summary()}")
            if name == "train":
                show_first(found, tokenizer)
        return found

    train = split("train", True) if options.training else None
    valid = split("valid", False) if options.training else None
    test = split("test", True) if options.test else None
    worker = trainer(model, options, source.checkpoint)  # which refuses a batch that a mesh does not divide
    running.device.note_mesh(model, options.batch_size)
    del model  # which a trainer of all weights does not keep
    with contextlib.closing(worker):
        if train is not None:  # nothing is written before all is known to fit
            planned = plan(options, train, worker.row_width)
            settings = {name: _plain(value) for name, value in vars(options).items() if name not in FREE}
            settings |= {"backend": type(worker).__module__.partition(".")[0], "examples": _fingerprint(train)}
            notes = {"source": _lasting(options.model), "hub": options.hub}
            notes["save_dtype"] = getattr(options, "save_dtype", None)
            notes |= {"base": _base(source.checkpoint), "valid": None if valid is None else _fingerprint(valid)}
            worker.processes.check_same(json.dumps([settings, planned.steps, notes["base"]], sort_keys=True))
            with using(options.out, settings, options.resume, notes, worker.processes):
                fit(options, worker, planned, train, valid)
        else:
            worker.load_export()
        if test is not None:
            found = evaluate(worker, feed(options, worker, test), options.test_batches)
            loss, is_entropy = found["loss"], options.loss == "sft"
            more = f"Test ppl {math.exp(min(loss, 700)):.3f}" if is_entropy else f"preferred {found['accuracy']:.1%}"
            print(f"Test loss {loss:.3f}, {more}.")


@dataclass(frozen=True)
class Plan:
    """What the options make of the training examples."""

    batches: "Batches"
    steps: int
    schedule: Callable[[int], float]  # learning rate by step


def plan(options: FinetuneOptions, train: "Split", row_width: Callable[[int], int]) -> Plan:
    """Raises `InputError` where the examples fill no batch, or the warm-up is longer than the run."""
    from minicpm_data.datasets.batches import Batches

    batches = Batches(
        train.examples,
        options.batch_size,
        options.max_seq_length,
        options.seed,
        pack=options.pack,
        accumulation=options.grad_accumulation_steps,
        row_width=row_width,
    )
    steps = options.iters or 1000
    if options.epochs is not None:
        steps = max(1, math.ceil(options.epochs * batches.per_epoch / options.grad_accumulation_steps))
    return Plan(batches, steps, schedule_of(options, steps))


def fit(options: FinetuneOptions, trainer: Trainer, plan: Plan, train: "Split", valid: "Split | None") -> None:
    """The training loop, from the last checkpoint (if there is one) to the export."""
    from tqdm import tqdm

    from minicpm_data.metrics import Metrics
    from minicpm_data.training.processes import Interrupt

    processes = trainer.processes
    several, batches, steps = options.grad_accumulation_steps, plan.batches, plan.steps
    rows = f"{options.batch_size * several} {'rows' if options.pack else 'examples'}"
    print(f"{steps} steps of {rows}, {batches.padding:.1%} of them padding")
    step = trainer.restore()
    if step:
        print(f"going on after step {step}")
    if step >= steps:
        trainer.export()  # in case the run was killed between its last checkpoint and the export
    known = references(options, trainer, train)
    valid_feed = None if valid is None else feed(options, trainer, valid)
    metrics = Metrics(options.out / "metrics.jsonl", step, options.report_to, options.project_name, processes.first)
    with (
        contextlib.closing(metrics),
        Interrupt() as interrupt,
        tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=processes.quiet) as bar,
    ):
        pending: list[dict[str, Any]] = []
        began, tokens = time.perf_counter(), 0

        def flush() -> dict[str, Any]:
            """Write down the steps since the last time, now that they are computed."""
            for record in pending:
                record |= {name: float(value) for name, value in record.items() if name not in WHOLE}
                for name in ("loss", "gradient_norm"):
                    if not math.isfinite(record[name]):
                        example = beginning(batches[(record["step"] - 1) * several])
                        raise InputError(
                            f"the {name.replace('_', ' ')} of step {record['step']} is {record[name]} (its first "
                            f"example begins with {example}); what was saved before is kept: --resume with a lower "
                            "--learning-rate, or mend the data and begin anew."
                        )
                metrics.write(record)
            last = pending[-1] if pending else {}
            pending.clear()
            return last

        stopping = False
        while step < steps and not stopping:
            made = [batches.part(step * several + i, trainer.own) for i in range(several)]
            group = [arrays(batch, known, trainer.own) for batch in made]
            rate = plan.schedule(step)
            figures = trainer.step(group, rate, step)
            if pending:
                float(pending[-1]["loss"])  # waits: one step is queued behind the one that runs, not more
            step += 1
            tokens += sum(batch.length for batch in made)
            epoch = step * several / batches.per_epoch
            pending.append({"step": step, "epoch": epoch, "learning_rate": rate, **figures})
            bar.update()
            evaluating = valid_feed is not None and (step % options.steps_per_eval == 0 or step in (1, steps))
            reporting = step % options.steps_per_report == 0 or step in (1, steps)
            stopping = processes.any(interrupt.wanted)  # read once: a step after which the loop ends is saved
            saving = step % options.save_every == 0 or step == steps or stopping
            if reporting or saving or evaluating:
                float(figures["loss"])  # waits for the device
                pending[-1]["tokens_per_second"] = tokens / (time.perf_counter() - began)
                if evaluating:
                    assert valid_feed is not None
                    pending[-1]["valid_loss"] = evaluate(trainer, valid_feed, options.val_batches)["loss"]
                last = flush()
                bar.set_postfix(loss=f"{last['loss']:.3f}", tokens_s=f"{last['tokens_per_second']:,.0f}")
                if reporting or evaluating:
                    bar.write(line(last))
                began, tokens = time.perf_counter(), 0
            if saving:
                trainer.save(step)
                if options.adapter is not None or step == steps:
                    trainer.export()
    if step < steps:
        print(f"stopped after step {step} of {steps}; the same command with --resume goes on from there.")
        raise KeyboardInterrupt
    processes.once(lambda: metrics.draw(options.out / "loss.png", by="step"))
    print(f"finished: {options.out}, loss curve in {options.out / 'loss.png'}")


WHOLE = ("step",)  # figures that are whole numbers


def line(record: Mapping[str, Any]) -> str:
    """One step for the screen, in the words of mlx_lm."""
    parts = [f"Iter {record['step']}: Train loss {record['loss']:.3f}"]
    if "accuracy" in record:
        parts.append(f"preferred {record['accuracy']:.1%}")
    if "valid_loss" in record:
        parts.append(f"Val loss {record['valid_loss']:.3f}")
    parts += [f"Learning rate {record['learning_rate']:.3e}", f"Tokens/sec {record['tokens_per_second']:,.0f}"]
    return ", ".join(parts)


def feed(options: FinetuneOptions, trainer: Trainer, split: "Split") -> "list[dict[str, np.ndarray]]":
    """All batches of an evaluation."""
    from minicpm_data.datasets.batches import evaluation_batches

    known = references(options, trainer, split)
    size = options.batch_size, options.max_seq_length
    batches = evaluation_batches(split.examples, *size, options.pack, trainer.own, trainer.row_width)
    return [arrays(batch, known, trainer.own) for batch in batches]


def arrays(batch: "Batch", references: "np.ndarray | None", own: "Own" = range) -> "dict[str, np.ndarray]":
    found = {"ids": batch.ids, "labels": batch.labels, "segments": batch.segments}
    if references is not None:
        assert batch.index is not None
        both = references[batch.index].T.reshape(-1)  # the chosen ones first
        found["reference"] = both[list(own(batch.size))]
    return found


def references(options: FinetuneOptions, trainer: Trainer, split: "Split") -> "np.ndarray | None":
    """[n + 1, 2] float32 of pairs: log-probabilities of both answers before training; the last, of empty rows, are 0.
    None where the loss asks for none."""
    import numpy as np
    from tqdm import tqdm

    from minicpm_data.datasets.batches import evaluation_batches

    if options.loss != "dpo":
        return None
    found = np.zeros((len(split.examples) + 1, 2), np.float32)
    size = options.batch_size, options.max_seq_length
    batches = evaluation_batches(split.examples, *size, own=trainer.own, row_width=trainer.row_width)
    total = -(-len(split.examples) // options.batch_size)
    quiet = trainer.processes.quiet
    for batch in tqdm(batches, total=total, unit="batch", desc="reference", leave=False, disable=quiet):
        found[batch.index] = trainer.reference(arrays(batch, None)).reshape(2, -1).T
    found[-1] = 0
    return found


def evaluate(trainer: Trainer, batches: "Sequence[Mapping[str, np.ndarray]]", limit: int) -> dict[str, float]:
    """The objective's means over at most ``limit`` batches (-1: all)."""
    sums: dict[str, float] = {}
    for batch in itertools.islice(batches, None if limit < 0 else limit):
        for name, value in trainer.evaluate(batch).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    weight = sums.pop("weight")
    return {name: value / max(weight, 1) for name, value in sums.items()}


def beginning(batch: "Batch") -> str:
    """The first token ids of a batch's first example."""
    return "ids " + " ".join(str(i) for i in batch.ids[0][:12].tolist())


def _plain(value: Any) -> Any:
    """As JSON has it, to be compared with what was written."""
    return json.loads(json.dumps(value, default=str))


def _lasting(model: str | None) -> str | None:
    """What names the model from any folder."""
    here = Path(model or "pico").expanduser()
    return str(here.resolve()) if model and here.exists() else model


def _base(checkpoint: "Checkpoint") -> str:
    """A hash of some rows of the model that is trained: the same name may stand for another one when a run is gone on
    with."""
    ends = (f"model.layers.{layer}." for layer in (0, checkpoint.config.num_hidden_layers - 1))
    read, digest = (*ends, "model.norm."), hashlib.sha256()
    for name in sorted(name for name in checkpoint.tensors if name.startswith(read)):
        digest.update(checkpoint.tensors[name].read((slice(0, 4),)).tobytes())
    return digest.hexdigest()


def _fingerprint(split: "Split") -> str:
    """A hash of the training examples."""
    digest = hashlib.sha256()
    for example in split.examples:
        for part in example.parts:
            digest.update(part.ids.tobytes() + part.trained.tobytes() + b"|")
    return digest.hexdigest()
