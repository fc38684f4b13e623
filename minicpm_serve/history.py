"""Evaluate the checkpoints of a training run, and draw the curve.

    python -m minicpm_serve.history --backend jax --model minicpm-2b-history --revisions step10000 step20000 \\
        --evaluation loss --data text.txt --save-path history

Checkpoints are revisions of ``--model``, or folders in it (on the hub or on this disk). Each result is appended to
``history.jsonl`` in ``--save-path``. After an interruption, the same command resumes.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from minicpm_data.cli.evaluate import ask_questions, replies
from minicpm_data.metrics import read_records
from minicpm_data.model_options import load_model
from minicpm_data.option_checks import check_range
from minicpm_serve import backends
from minicpm_serve.evaluation.curves import draw
from minicpm_serve.evaluation.needles import answer_tokens, evaluation_samples, is_right
from minicpm_serve.evaluation.perplexity import loss_of, read_texts
from weights_io import catalog
from weights_io.command_line import Former, former_names
from weights_io.errors import InputError
from weights_io.files.partial import write_whole
from weights_io.hub import locate
from weights_io.write import folder_to_fill

if TYPE_CHECKING:
    pass

VALUES = {  # evaluation -> the value that is drawn, and its label
    "questions": ("score", "share of the questions answered rightly"),
    "passkey": ("score", "share of the pass keys found"),
    "loss": ("loss", "cross entropy (nats per token)"),
}
SETTINGS = {
    "questions": ("limit", "seed"),
    "passkey": ("num_samples", "max_seq_length", "seed"),
    "loss": ("data", "max_seq_length"),
}


@dataclass(frozen=True, kw_only=True)
class Options(backends.BackendOptions):
    save_path: Annotated[Path, Former("out")]
    """Folder for history.jsonl and history.png."""
    revisions: tuple[str, ...] = ()
    """Branches, tags or commits of --model with the checkpoints, in the order of the run."""
    folders: tuple[str, ...] = ()
    """In place of --revisions: folders in --model or, without --model, model folders."""
    evaluation: Literal["questions", "loss", "passkey"] = "questions"
    """questions: the built-in questions; loss: the loss on --data; passkey: pass keys found in long texts."""
    data: Path | None = None
    """Text to measure the loss on: a text file, or a .jsonl file with "text" in each line."""
    max_seq_length: Annotated[int, Former("length")] = 512
    """Tokens of a text with a pass key, or of each window of --data."""
    num_samples: Annotated[int, Former("samples")] = 20
    """Number of texts with a pass key."""
    limit: int | None = None
    """Number of questions to ask. By default all 900 are asked."""
    seed: int = 0
    """Seed of the questions or the pass keys."""
    batch_size: int = 8
    """Questions, texts or windows in a batch."""

    def settings(self) -> dict[str, Any]:
        """The settings that all results of one curve share."""
        names = ("evaluation", *SETTINGS[self.evaluation], "dtype")
        values = {name: getattr(self, name) for name in names}
        written = {field: former for former, field in former_names(Options).items()}  # as in lines of earlier versions
        shown = {written.get(n, n): str(v) if isinstance(v, Path) else v for n, v in values.items()}
        return {"model": self.model} | shown


@dataclass(frozen=True)
class RunCheckpoint:
    """One checkpoint of the run, and where to load it from."""

    name: str
    model: str
    revision: str | None


def main(options: Options) -> None:
    """Evaluate the checkpoints of a training run one after the other, and draw the curve."""
    options.check_placement()
    check_range(options, "max_seq_length", "num_samples", "limit", "batch_size", least=1)
    if (options.evaluation == "loss") != (options.data is not None):
        raise InputError("loss and {data} go together; give both or neither.", "evaluation", ["data"])
    if options.data is not None and options.max_seq_length < 2:
        raise InputError("is 1, and a window of one token predicts none; give at least 2.", option="max_seq_length")
    listed = checkpoints(options)
    documents = [] if options.data is None else read_texts(options.data)
    for checkpoint in listed:  # a wrong name is told before the first one is run
        try:
            locate(checkpoint.model, checkpoint.revision, options.hub)
        except InputError as error:
            raise InputError(f"{checkpoint.name}: {error}") from None
    with folder_to_fill(options.save_path):
        evaluate_all(options, listed, documents)


def evaluate_all(options: Options, listed: Sequence[RunCheckpoint], documents: Sequence[str]) -> None:
    """Evaluate the checkpoints without a result, and redraw the curve after each."""
    from tqdm import tqdm

    kept, settings = options.save_path / "history.jsonl", options.settings()
    earlier = read_records(kept) if kept.exists() else []
    if kept.exists():
        write_whole(kept, "".join(json.dumps(record) + "\n" for record in earlier))  # without an incomplete line
    done = {r["name"]: r for r in earlier if r.items() >= settings.items()}
    done = {c.name: done[c.name] for c in listed if c.name in done}
    key, label = VALUES[options.evaluation]
    for checkpoint in tqdm(listed, desc="checkpoints", disable=None):
        if checkpoint.name not in done:
            try:
                result = evaluated(options, checkpoint, documents)
            except InputError as error:
                raise InputError(f"{checkpoint.name}: {error}") from None
            done[checkpoint.name] = {"name": checkpoint.name, **settings, **result}
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[checkpoint.name]) + "\n")
        tqdm.write(f"{checkpoint.name:24} {key} {done[checkpoint.name][key]:.4f}")
        draw(options.save_path / "history.png", {c.name: done[c.name][key] for c in listed if c.name in done}, label)


def checkpoints(options: Options) -> list[RunCheckpoint]:
    """The checkpoints of --revisions or --folders, in order. Raises `InputError` unless exactly one is given."""
    if bool(options.revisions) == bool(options.folders):
        raise InputError("give the checkpoints with --revisions or with --folders, one of the two.")
    names = options.revisions or options.folders
    if len(set(names)) < len(names):
        raise InputError("the same checkpoint is named twice; name each once.")
    if options.folders:
        entry = catalog.find(options.model) if options.model else None
        start = f"{entry.repo if entry and entry.repo else options.model}/" if options.model else ""
        return [RunCheckpoint(name, start + name, options.revision) for name in names]
    if options.model is None or options.revision is not None:
        raise InputError("are those of {model}, and take the place of {revision}.", "revisions", ["model", "revision"])
    return [RunCheckpoint(name, options.model, name) for name in names]


def evaluated(options: Options, checkpoint: RunCheckpoint, documents: Sequence[str]) -> dict[str, Any]:
    """The results of one checkpoint. Its memory is freed afterwards."""
    backend = backends.get(options.backend)
    here = dataclasses.replace(options, model=checkpoint.model, revision=checkpoint.revision)
    model, tokenizer = load_model(backend, here)
    backend.device.warn_idle_axes(model, options.batch_size)
    if options.evaluation == "loss":
        return loss_of(options.backend, model, tokenizer, documents, options.max_seq_length, options.batch_size)
    if options.evaluation == "passkey":
        samples = evaluation_samples(
            "passkey", tokenizer.encode, options.max_seq_length, options.num_samples, options.seed
        )
        prompts, most = [sample.ids for sample in samples], answer_tokens("passkey", tokenizer.encode)
        said = replies(backend, model, tokenizer, prompts, options.batch_size, most)
        return {"score": sum(map(is_right, samples, said)) / len(samples)}
    kinds: dict[str, list[bool]] = defaultdict(list)
    for answer in ask_questions(backend, model, tokenizer, options.limit, options.batch_size, seed=options.seed):
        kinds[answer.question["kind"]].append(answer.right)
    right = [r for group in kinds.values() for r in group]
    return {"kinds": {kind: sum(r) / len(r) for kind, r in kinds.items()}, "score": sum(right) / len(right)}


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m minicpm_serve.history")
