"""Fine-tuning for both backends: options and data to a run of the training loop."""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from minicpm_data.generation.api import Backend
from minicpm_data.model_options import load_model, open_early, open_source
from minicpm_data.tokenizer.chat_template import PLAIN_TEMPLATE
from minicpm_data.training import loop, trainable
from minicpm_data.training.loop import Arrays, Count, Plan
from minicpm_data.training.options import (
    FinetuneOptions,
    FullOptions,
    check,
    check_layers,
    schedule_of,
    settings_of,
)
from minicpm_data.training.processes import leaving_at_interrupts
from minicpm_data.training.yaml_config import flags_of_file
from weights_io import command_line

if TYPE_CHECKING:
    import numpy as np

    from minicpm_data.datasets.batches import Batches
    from minicpm_data.datasets.examples import Split, SplitName
    from weights_io.checkpoint import Checkpoint
    from weights_io.vision.config import VisionConfig


class FinetuneTrainer(loop.Trainer, Protocol):
    """The interface of a backend's trainer for fine-tuning. `Make` builds it."""

    def row_width(self, length: int) -> int:
        """Round the width of a row with ``length`` tokens up, to limit the number of shapes."""

    def reference(self, batch: Arrays) -> "np.ndarray":
        """The log-probability of the trained tokens under the model before training, for all rows of all processes."""

    def load_export(self) -> None:
        """Load what `export` wrote."""


Make = Callable[
    [Any, FinetuneOptions, "Checkpoint"], FinetuneTrainer
]  # the loaded model, the options, the base checkpoint


def run(backend: Callable[[], Backend], trainer: Make, options: type[FinetuneOptions], prog: str) -> None:
    """``python -m PACKAGE.lora`` and ``.finetune``. ``backend`` is imported only when the flags are valid."""

    def main(options: FinetuneOptions) -> None:
        """Fine-tune a MiniCPM (or Llama) model on conversations, texts or preferences."""
        finetune(options, backend, trainer)

    def flags_of_config(given: FinetuneOptions) -> list[str]:
        return [] if given.config is None else flags_of_file(given.config, options)

    with leaving_at_interrupts():
        command_line.run(main, options, prog, flags_of_config)


def finetune(options: FinetuneOptions, backend: Callable[[], Backend], trainer: Make) -> None:
    """Train and test. Raises `InputError` for options, data or a run folder that cannot be used."""
    from minicpm_data.metrics import check_reporter
    from minicpm_data.training.run_folder import check_folder

    check(options)
    if options.training:
        check_folder(options.out, options.resume)
        check_reporter(options.report_to)
    here = open_early(options)
    running = backend()
    source = open_source(options, here)
    model, tokenizer = load_model(running, options, source=source)
    check_layers(options, model.config)
    if options.ignore_chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    vision = model.config.vision
    train = read_split(options, tokenizer, "train", vision=vision) if options.training else None
    validating = options.training and options.val_batches != 0
    valid = read_split(options, tokenizer, "valid", False, vision) if validating else None
    test = read_split(options, tokenizer, "test", vision=vision) if options.test else None
    worker = trainer(model, options, source.checkpoint)  # refuses a batch that the mesh does not divide
    running.device.warn_idle_axes(model, options.batch_size)
    del model  # full fine-tuning does not keep it
    with contextlib.closing(worker):
        if train is None:
            worker.load_export()
        else:
            train_and_export(options, worker, source.checkpoint, train, valid)
        if test is not None:
            found = mean_losses(worker, feed(options, worker, test), options.test_batches)
            loss, is_entropy = found["loss"], options.loss == "sft"
            more = f"Test ppl {math.exp(min(loss, 700)):.3f}" if is_entropy else f"preferred {found['accuracy']:.1%}"
            print(f"Test loss {loss:.3f}, {more}.")


def read_split(
    options: FinetuneOptions,
    tokenizer: Any,
    name: "SplitName",
    required: bool = True,
    vision: "VisionConfig | None" = None,
) -> "Split | None":
    """Load a split of the data, and print a summary of it."""
    from minicpm_data.datasets.examples import load_split, show_first

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
        vision=vision,
    )
    if found is not None:
        print(f"{name}: {found.summary()}")
        if name == "train":
            show_first(found, tokenizer)
    return found


def train_and_export(
    options: FinetuneOptions, trainer: FinetuneTrainer, base: "Checkpoint", train: "Split", valid: "Split | None"
) -> None:
    """Train in the run's folder. Nothing is written before all checks have passed."""
    from minicpm_data.training.run_folder import using

    batches = batches_of(options, train, trainer.row_width)
    planned = plan(options, batches, evaluating=valid is not None)
    backend = type(trainer).__module__.partition(".")[0]
    settings = settings_of(options) | {"backend": backend, "examples": _fingerprint(train)}
    notes: dict[str, Any] = {"source": _lasting(options.model), "hub": options.hub}
    notes["save_dtype"] = options.save_dtype if isinstance(options, FullOptions) else None
    notes |= {"base": _base(base), "valid": None if valid is None else _fingerprint(valid)}
    trainer.processes.check_consistent(json.dumps([settings, planned.steps, notes["base"]], sort_keys=True))
    with using(options.out, settings, options.resume, notes, trainer.processes):
        rows = f"{options.batch_size * options.grad_accumulation_steps} {'rows' if options.pack else 'examples'}"
        print(f"{planned.steps} steps of {rows}, {batches.padding:.1%} of them padding")
        print(trainable.share(options, base.config))
        step = loop.restored(planned, trainer)
        known = references(options, trainer, train)
        valid_feed = [] if valid is None else feed(options, trainer, valid)
        loop.fit(planned, trainer, Examples(options, trainer, batches, known, valid_feed), step)


def batches_of(options: FinetuneOptions, train: "Split", row_width: Callable[[int], int]) -> "Batches":
    """The training batches. Raises `InputError` where the examples do not fill one batch."""
    from minicpm_data.datasets.batches import Batches

    return Batches(
        train.examples,
        options.batch_size,
        options.max_seq_length,
        options.seed,
        pack=options.pack,
        accumulation=options.grad_accumulation_steps,
        row_width=row_width,
    )


def plan(options: FinetuneOptions, batches: "Batches", evaluating: bool) -> Plan:
    """The plan of the run. Raises `InputError` where the warm-up is longer than the run."""
    steps = options.iters or 1000
    if options.epochs is not None:
        steps = max(1, math.ceil(options.epochs * batches.per_epoch / options.grad_accumulation_steps))
    return Plan(
        options.out,
        steps,
        schedule_of(options, steps),
        save_every=options.save_every,
        report_every=options.steps_per_report,
        evaluate_every=options.steps_per_eval if evaluating else None,
        also=(1, steps),
        export_saved=options.adapter is not None,
        report_to=options.report_to,
        project_name=options.project_name,
        curve={"by": "step"},
    )


@dataclass(frozen=True)
class Examples:
    """The `loop.Source` of fine-tuning."""

    options: FinetuneOptions
    trainer: FinetuneTrainer
    train: "Batches"
    known: "np.ndarray | None"  # `references` of the training examples
    valid: Sequence[Arrays]

    def batches(self, step: int) -> tuple[Sequence[Arrays], Count]:
        several, local_rows = self.options.grad_accumulation_steps, self.trainer.local_rows
        made = [self.train.part(step * several + i, local_rows) for i in range(several)]
        count = Count(sum(batch.length for batch in made), sum(batch.trained for batch in made))
        return [batch.arrays(self.known, local_rows) for batch in made], count

    def figures(self, step: int) -> Mapping[str, Any]:
        return {"epoch": step * self.options.grad_accumulation_steps / self.train.per_epoch}

    def evaluation(self) -> Mapping[str, float]:
        return {"valid_loss": mean_losses(self.trainer, self.valid, self.options.val_batches)["loss"]}

    def first_ids(self, step: int) -> Sequence[int]:
        return self.train[step * self.options.grad_accumulation_steps].ids[0].tolist()


def feed(options: FinetuneOptions, trainer: FinetuneTrainer, split: "Split") -> "list[dict[str, np.ndarray]]":
    """All batches of a validation or test split."""
    from minicpm_data.datasets.batches import evaluation_batches

    known = references(options, trainer, split)
    size = options.batch_size, options.max_seq_length
    batches = evaluation_batches(split.examples, *size, options.pack, trainer.local_rows, trainer.row_width)
    return [batch.arrays(known, trainer.local_rows) for batch in batches]


def references(options: FinetuneOptions, trainer: FinetuneTrainer, split: "Split") -> "np.ndarray | None":
    """The log-probabilities of the answers before training, for DPO.

    Returns:
        [n + 1, 2] float32: chosen and rejected answer of each pair, and zeros for padding rows. None for other losses.
    """
    import numpy as np
    from tqdm import tqdm

    from minicpm_data.datasets.batches import evaluation_batches

    if options.loss != "dpo":
        return None
    found = np.zeros((len(split.examples) + 1, 2), np.float32)
    size = options.batch_size, options.max_seq_length
    batches = evaluation_batches(split.examples, *size, local_rows=trainer.local_rows, row_width=trainer.row_width)
    total = -(-len(split.examples) // options.batch_size)
    quiet = trainer.processes.quiet
    for batch in tqdm(batches, total=total, unit="batch", desc="reference", leave=False, disable=quiet):
        found[batch.index] = trainer.reference(batch.arrays()).reshape(2, -1).T
    found[-1] = 0
    return found


def mean_losses(trainer: FinetuneTrainer, batches: Sequence[Arrays], limit: int) -> dict[str, float]:
    """The means of the objective over at most ``limit`` batches (-1: all)."""
    import numpy as np

    return loop.means(trainer, batches, None if limit < 0 else limit, np.float64)


def _lasting(model: str | None) -> str | None:
    """The model's name, as an absolute path if it is a folder."""
    here = Path(model or "pico").expanduser()
    return str(here.resolve()) if model and here.exists() else model


def _base(checkpoint: "Checkpoint") -> str:
    """A hash of some rows of the base model, because a name may mean another model when the run is resumed."""
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
            digest.update(b"".join(image.digest for image in part.images))
    return digest.hexdigest()
