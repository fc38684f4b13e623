"""Pretraining for both backends: options and data to a run of the training loop."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from minicpm_data.option_checks import check_range
from minicpm_data.schedules import WarmupStableDecay
from minicpm_data.training import loop
from minicpm_data.training.loop import Arrays, Count, Plan
from minicpm_data.training.options import PretrainOptions, settings_of
from minicpm_data.training.processes import leaving_at_interrupts
from weights_io import command_line
from weights_io.command_line import former_names
from weights_io.errors import InputError
from weights_io.hub import locate
from weights_io.progress import waiting

if TYPE_CHECKING:
    import numpy as np

    from minicpm_data.datasets.pretraining import WindowBatches
    from minicpm_data.tokenizer.tokenizer import Tokenizer
    from weights_io.config import ModelConfig

REPORT_EVERY = 10  # steps between lines of metrics.jsonl
VALID_BATCHES = 16  # most batches of a validation loss


class PretrainTrainer(loop.Trainer, Protocol):
    """The interface of a backend's trainer for pretraining. Batches hold only ids [B, T]; documents start with BOS."""

    config: "ModelConfig"
    raw_config: dict[str, Any]  # config.json


Make = Callable[..., PretrainTrainer]  # of the options, the id of BOS, and what `PretrainOptions.placement` says


def run(trainer: Make, options: type[PretrainOptions], prog: str) -> None:
    """``python -m PACKAGE.pretrain``. ``trainer`` imports its backend only when the flags are valid."""

    def main(options: PretrainOptions) -> None:
        """Train a MiniCPM from scratch, or resume an interrupted run."""
        pretrain(options, trainer)

    with leaving_at_interrupts():
        command_line.run(main, options, prog)


def pretrain(options: PretrainOptions, trainer: Make) -> None:
    """Pretrain. Raises `InputError` for options, data or a run folder that cannot be used."""
    from minicpm_data.tokenizer.folder import load_tokenizer
    from minicpm_data.training.run_folder import using

    check(options)
    schedule = WarmupStableDecay(
        options.learning_rate,
        options.iters,
        options.warmup_steps,
        options.decay_steps,
        options.decay,
        options.half_life,
    )
    with waiting("starting"):
        placement = options.placement()  # must come before the first use of a device
    tokenizer = load_tokenizer(options.tokenizer)
    if tokenizer.bos_token_id is None or not tokenizer.eos_token_ids:
        raise InputError(
            f"the tokenizer of {options.tokenizer} has no BOS or no EOS to separate documents; use another."
        )
    with waiting("preparing the weights"):
        worker = trainer(options, tokenizer.bos_token_id, **placement)
    with contextlib.closing(worker):
        stages, fingerprint = read_stages(options, tokenizer, worker.config.vocab_size)
        # The stages follow from the schedule, so the warm-up and the number of steps must stay the same too.
        settings = settings_of(options) | {"warmup_steps": options.warmup_steps, "iters": options.iters}
        settings |= {"backend": type(worker).__module__.partition(".")[0]}
        settings |= {"config": worker.config.to_dict(), "data": fingerprint}
        notes = {"config.json": worker.raw_config, "tokenizer": str(options.tokenizer.resolve())}
        notes["save_dtype"] = options.save_dtype
        worker.processes.check_consistent(json.dumps(settings, sort_keys=True))
        with using(options.out, settings, options.resume, notes, worker.processes, former_names(type(options))):
            planned = plan(options, schedule)
            step = loop.restored(planned, worker)
            loop.fit(planned, worker, Windows(options, worker, stages, schedule.decay_start), step)


def check(options: PretrainOptions) -> None:
    """Check the options before heavy imports and before anything is written. Raises `InputError`."""
    from minicpm_data.metrics import check_reporter
    from minicpm_data.training.run_folder import check_folder

    options.check_placement()
    check_reporter(options.report_to)
    check_range(options, "iters", "batch_size", "save_every", "steps_per_eval", least=1)
    check_range(options, "max_seq_length", least=2)
    check_range(options, "learning_rate", "clip", "half_life", above=0)
    check_range(options, "seed", least=0, below=2**32)
    check_range(options, "beta1", "beta2", "weight_decay", least=0, below=1)
    if (options.config is None) == (options.init_from is None):
        raise InputError("give either --config, for a new model, or --init-from, for an existing one.")
    if not 0 <= options.from_step < options.iters or (options.from_step and options.init_from is None):
        raise InputError(
            f"is {options.from_step}; it is for {{init_from}}, and below the {options.iters} of {{iters}}.",
            option="from_step",
            others=["init_from", "iters"],
        )
    check_folder(options.out, options.resume)
    for name in ("config", "tokenizer", "data"):
        path = getattr(options, name)
        if path is not None and not path.expanduser().exists():
            raise InputError(f"{path} does not exist; check its name and its folder.", option=name)
    if options.init_from is not None:
        locate(options.init_from, check=lambda raw, source: None)


class Stage(NamedTuple):
    """The data of one stage of the schedule, stable or decay."""

    train: "WindowBatches"
    valid: "np.ndarray"  # windows [n, T]


def read_stages(options: PretrainOptions, tokenizer: "Tokenizer", vocab_size: int) -> tuple[dict[str, Stage], str]:
    """The data of both stages, and a hash of it."""
    from minicpm_data.datasets.pretraining import WindowBatches, pack
    from minicpm_data.datasets.preview import show
    from minicpm_data.tokenizer.from_checkpoint import check_vocab

    check_vocab(tokenizer, vocab_size)
    stages, fingerprint = {}, hashlib.sha256()
    reading = options.max_seq_length, options.ignore_keys, not options.special_tokens_as_text
    for name in ("stable", "decay"):
        windows, valid = (
            pack(options.data / name / f"{split}.jsonl", tokenizer, *reading) for split in ("train", "valid")
        )
        stages[name] = Stage(WindowBatches(windows, options.batch_size, options.seed), valid)
        fingerprint.update(windows.tobytes() + valid.tobytes())
        print(f"{name}: {windows.size:,} tokens in windows of {options.max_seq_length}")
        first = windows[0]
        show("the first window", first, first != tokenizer.bos_token_id, tokenizer)
    return stages, fingerprint.hexdigest()


def plan(options: PretrainOptions, schedule: WarmupStableDecay) -> Plan:
    """The plan of the run."""
    stable = (schedule.decay_start - options.from_step) * options.batch_size * options.max_seq_length
    return Plan(
        options.out,
        options.iters,
        schedule,
        save_every=options.save_every,
        report_every=REPORT_EVERY,
        evaluate_every=options.steps_per_eval,
        also=(options.iters,),
        record_all=False,
        first=options.from_step,
        report_to=options.report_to,
        project_name=options.project_name,
        curve={"by": "tokens", "decay_at": max(stable, 0)},
    )


@dataclass(frozen=True)
class Windows:
    """The `loop.Source` of pretraining. The decay stage starts at step ``decay_start``, with its own data."""

    options: PretrainOptions
    trainer: PretrainTrainer
    stages: Mapping[str, Stage]
    decay_start: int

    def _stage(self, step: int) -> tuple[str, int]:
        """The stage of a step, and the number of earlier steps of that stage in this run."""
        name, start = ("decay", self.decay_start) if step >= self.decay_start else ("stable", 0)
        return name, step - max(start, self.options.from_step)

    def batches(self, step: int) -> tuple[Sequence[Arrays], Count]:
        name, number = self._stage(step)
        ids = self.stages[name].train.part(number, self.trainer.local_rows)
        return [{"ids": ids}], Count(self._tokens, self._tokens)

    def figures(self, step: int) -> Mapping[str, Any]:
        return {"stage": self._stage(step - 1)[0], "tokens": (step - self.options.from_step) * self._tokens}

    @property
    def _tokens(self) -> int:
        """Tokens per step."""
        return self.options.batch_size * self.options.max_seq_length

    def evaluation(self) -> Mapping[str, float]:
        """The loss of each stage's validation data, over full batches."""
        import numpy as np

        found = {}
        for name, stage in self.stages.items():
            width = min(self.options.batch_size, len(stage.valid))
            batches = ({"ids": stage.valid[i : i + width]} for i in range(0, len(stage.valid) - width + 1, width))
            found[f"{name}_valid_loss"] = loop.means(self.trainer, batches, VALID_BATCHES, np.float32)["loss"]
        return found

    def first_ids(self, step: int) -> Sequence[int]:
        name, number = self._stage(step)
        return self.stages[name].train[number][0].tolist()
