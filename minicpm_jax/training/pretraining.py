"""Pretraining: the options, the stages and their data, the loop."""

import contextlib
import functools
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from minicpm_data.datasets.options import DataOptions
from minicpm_data.schedules import Decay, WarmupStableDecay
from minicpm_jax.options import Placement
from weights_io.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from minicpm_data.datasets.pretraining import WindowBatches
    from weights_io.config import ModelConfig


REPORT_EVERY = 10  # steps between lines of metrics.jsonl
# A resumed run must agree on the model, on the data and on all options but these.
FREE = frozenset(
    """config init_from tokenizer data out learning_rate clip save_dtype save_every valid_every remat resume report_to
    ignore_keys special_tokens_as_text project_name mesh distributed coordinator_address num_processes process_id
    join_timeout""".split()
)


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, Placement):
    tokenizer: Path
    """Folder of the tokenizer."""
    data: Path
    """Folder with stable/ and decay/, each with train.jsonl and valid.jsonl."""
    out: Path
    """Folder for checkpoints, metrics and the finished model."""
    config: Path | None = None
    """config.json of the model to make from nothing."""
    init_from: str | None = None
    """Begin with this model's weights (folder, hub id or short name) in place of --config."""
    from_step: int = 0
    """Begin at this step of the schedule: there is no warm-up after it, and the data is that of its stage."""
    steps: int = 5000
    """Optimiser steps in all."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int = 500
    """Steps of the decay stage, at the end; 10 percent of all is enough."""
    decay: Decay = "exponential"
    """Form of the decay."""
    half_life: float = 140.0
    """Steps in which the exponential decay halves the learning rate."""
    batch_size: int = 16
    """Windows a step."""
    seq_length: int = 256
    """Tokens a window."""
    learning_rate: float = 0.01
    """Rate of the stable stage; matrices get muP's share of it."""
    weight_decay: float = 0.1
    """AdamW's, on matrices."""
    beta1: float = 0.9
    """AdamW's."""
    beta2: float = 0.95
    """AdamW's."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute in this; masters and moments are float32. Default: bfloat16, and float32 on a CPU and TPU v2 or v3."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the finished model."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, a third more work."""
    save_every: int = 500
    """Steps between checkpoints."""
    valid_every: int = 250
    """Steps between validation losses."""
    resume: bool = False
    """Go on with the run in the output folder, from its last checkpoint."""
    report_to: Literal["wandb", "tensorboard"] | None = None
    """Also send the figures there."""
    project_name: str | None = None
    """Name of wandb's project; by default that of the output folder."""
    seed: int = 0
    """Of initialisation and data order."""


def pretrain(options: Options) -> None:
    """Train a MiniCPM from nothing (or go on with an interrupted run)."""
    check(options)
    with contextlib.ExitStack() as held:
        train_and_save(options, held)


def beginning(options: Options, mesh: Any) -> "tuple[ModelConfig, dict[str, Any], dict[str, Any]]":
    """Config, config.json and float32 weights at the first step. A new model's are made where they are to be."""
    import jax

    from minicpm_jax import device
    from minicpm_jax.loading import load_weights
    from minicpm_jax.model import initialise
    from minicpm_jax.parallel.sharding import shardings, share
    from minicpm_jax.training import step as train
    from weights_io.checkpoint import open_model
    from weights_io.config import ModelConfig
    from weights_io.files.json_text import read_json
    from weights_io.memory import SMALLER, check_training

    def check(config: ModelConfig) -> None:
        check_training(config, "adamw", device.free_memory(mesh), share(config, mesh))

    if options.config is not None:
        config = ModelConfig.from_file(options.config)
        check(config)
        where = None if mesh is None else shardings(config, mesh)
        make = jax.jit(lambda key: train.weights_of(initialise(config, key)), out_shardings=where)
        return config, read_json(options.config), make(jax.random.key(options.seed))
    checkpoint = open_model(options.init_from)
    check(checkpoint.config)
    weights = train.weights_of(load_weights(checkpoint, "float32", mesh, remedy=SMALLER))
    return checkpoint.config, dict(checkpoint.raw_config), weights


class Stage(NamedTuple):
    train: "WindowBatches"
    valid: "np.ndarray"  # windows [n, T]


def read_data(options: Options, vocab_size: int) -> tuple[dict[str, Stage], int, str]:
    """The windows of both stages, the id that begins a document, and a hash of all the windows."""
    from minicpm_data.datasets.pretraining import WindowBatches, pack
    from minicpm_data.datasets.preview import show
    from minicpm_data.tokenizer.folder import load_tokenizer
    from minicpm_data.tokenizer.from_checkpoint import check_vocab

    tokenizer = load_tokenizer(options.tokenizer)
    check_vocab(tokenizer, vocab_size)
    if tokenizer.bos_token_id is None or not tokenizer.eos_token_ids:
        raise InputError(f"the tokenizer of {options.tokenizer} has no BOS or no EOS, which part the documents.")
    stages, fingerprint = {}, hashlib.sha256()
    reading = options.seq_length, options.ignore_keys, not options.special_tokens_as_text
    for name in ("stable", "decay"):
        windows, valid = (
            pack(options.data / name / f"{split}.jsonl", tokenizer, *reading) for split in ("train", "valid")
        )
        stages[name] = Stage(WindowBatches(windows, options.batch_size, options.seed), valid)
        fingerprint.update(windows.tobytes() + valid.tobytes())
        print(f"{name}: {windows.size:,} tokens in windows of {options.seq_length}")
        first = windows[0]
        show("the first window", first, first != tokenizer.bos_token_id, tokenizer)
    return stages, tokenizer.bos_token_id, fingerprint.hexdigest()


def check(options: Options) -> None:
    """Refuse what cannot work before anything heavy is imported or anything is written."""
    from minicpm_data.metrics import check_reporter
    from minicpm_data.training.run_folder import check_folder

    options.check_placement()
    check_reporter(options.report_to)
    for name in ("steps", "batch_size", "save_every", "valid_every"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1.")
    for name in ("learning_rate", "clip", "half_life"):
        if not 0 < getattr(options, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be above 0.")
    if not 0 <= options.seed < 2**32:
        raise InputError(f"--seed is {options.seed}; it must be from 0 to below 2**32.")
    for name in ("beta1", "beta2", "weight_decay"):
        if not 0 <= getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be from 0 to below 1.")
    if (options.config is None) == (options.init_from is None):
        raise InputError("give either --config, for a new model, or --init-from, for one that is there.")
    if not 0 <= options.from_step < options.steps or (options.from_step and options.init_from is None):
        raise InputError(
            f"--from-step is {options.from_step}; it is for --init-from, and below the {options.steps} of --steps."
        )
    if options.seq_length < 2:
        raise InputError(f"--seq-length is {options.seq_length}; a window needs at least 2 tokens.")
    check_folder(options.out, options.resume)


def check_finite(steps: "Sequence[tuple[int, Mapping[str, Any], np.ndarray]]", latest: int) -> None:
    """`InputError` for the first step (its number, figures and first window) after which nothing is worth keeping."""
    for step, figures, window in steps:
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(figures[name]):
                raise InputError(
                    f"the {name.replace('_', ' ')} of step {step} is {float(figures[name])}; the last checkpoint is of "
                    f"step {latest}: --resume with a lower --learning-rate, or mend the data (its first window begins "
                    f"with the ids {' '.join(map(str, window[:12].tolist()))})."
                )


def valid_loss(weights: dict[str, Any], windows: "np.ndarray", batch_size: int, fixed: dict[str, Any]) -> float:
    """Mean loss over the full batches of at most 16 batches of the validation windows."""
    from minicpm_jax.training.step import packed_evaluation

    width = min(batch_size, len(windows))
    starts = range(0, min(len(windows), 16 * width) - width + 1, width)
    losses = [packed_evaluation(weights, windows[i : i + width], **fixed) for i in starts]
    return float(sum(losses) / len(losses))


def save_model(options: Options, config: "ModelConfig", raw: dict[str, Any], step: int) -> None:
    """The model of the checkpoint of that step in Hugging Face layout, with its tokenizer."""
    from minicpm_data.training.run_folder import replace_model
    from minicpm_jax.training.run_checkpoints import Saved
    from weights_io.write import save_checkpoint

    tensors = Saved(options.out / "checkpoints", step).tensors(config)
    further: dict[str, Any] = {"raw_config": raw, "copy_from": options.tokenizer, "dtype": options.save_dtype}
    replace_model(options.out, lambda new: save_checkpoint(new, config, tensors, **further))


def train_and_save(options: Options, held: contextlib.ExitStack) -> None:
    """``held`` gets the lock of the run's folder, which stays to the end."""
    from tqdm import tqdm

    from minicpm_data.metrics import Metrics
    from minicpm_data.training.loop import line
    from minicpm_data.training.processes import Interrupt
    from minicpm_data.training.run_folder import using
    from minicpm_jax import device
    from minicpm_jax.parallel import processes as hosts
    from minicpm_jax.parallel.mesh import own_rows, placed_rows
    from minicpm_jax.parallel.sharding import note_idle
    from minicpm_jax.training import optimizers
    from minicpm_jax.training import step as train
    from minicpm_jax.training.run_checkpoints import Checkpoints

    mesh = options.placement()["mesh"]
    processes, own = hosts.processes(), functools.partial(own_rows, mesh)
    dtype = options.dtype or device.usual_dtype("bfloat16")
    device.check_dtype(dtype)
    own(options.batch_size)  # refused before anything is written
    config, raw, weights = beginning(options, mesh)
    schedule = WarmupStableDecay(
        options.learning_rate,
        options.steps,
        options.warmup_steps,
        options.decay_steps,
        options.decay,
        options.half_life,
    )
    stages, bos_token_id, fingerprint = read_data(options, config.vocab_size)
    optimiser = optimizers.mup_optimizer(config, options.beta1, options.beta2, options.weight_decay, options.clip)
    fixed: dict[str, Any] = {"trained": train.AllWeights(config, dtype, mesh), "bos_token_id": bos_token_id}
    settings = {name: value for name, value in vars(options).items() if name not in FREE}
    settings |= {"config": config.to_dict(), "data": fingerprint}
    notes = {"config.json": raw, "tokenizer": str(options.tokenizer.resolve()), "save_dtype": options.save_dtype}
    processes.check_same(json.dumps(settings, sort_keys=True))
    held.enter_context(using(options.out, settings, options.resume, notes, processes))
    note_idle(config, mesh, options.batch_size)
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(options.out / "checkpoints")))
        state = checkpoints.restore(train.beginning(weights, optimiser, mesh))
        del weights
        step = checkpoints.latest or options.from_step
        if step:
            print(f"going on after step {step}")
        bar = stack.enter_context(tqdm(total=options.steps, initial=step, unit="step", disable=processes.quiet))
        metrics = Metrics(options.out / "metrics.jsonl", step, options.report_to, options.project_name, processes.first)
        stack.callback(metrics.close)
        began, start = time.perf_counter(), step
        stopping, unseen = False, []  # steps whose figures nobody has looked at
        while step < options.steps and not stopping:
            # The decay stage reads its own data from its first batch on.
            stage, offset = ("decay", schedule.decay_start) if step >= schedule.decay_start else ("stable", 0)
            rows, rate = stages[stage].train.part(step - max(offset, options.from_step), own), schedule(step)
            batch = placed_rows({"ids": rows[None]}, mesh, options.batch_size)["ids"][0]
            new, figures = train.pretrain_step(state, batch, rate, optimiser=optimiser, remat=options.remat, **fixed)
            state = train.where_it_was(new, state)
            step += 1
            unseen.append((step, figures, rows[0]))
            bar.update()
            stopping = processes.any(interrupt.wanted)  # read once: a step after which the loop ends is saved
            validate = step % options.valid_every == 0 or step == options.steps
            saving = step % options.save_every == 0 or step == options.steps or stopping
            reporting = validate or step % REPORT_EVERY == 0
            if saving or reporting:
                check_finite(unseen, checkpoints.latest)
                unseen.clear()
            if reporting:
                tokens = (step - options.from_step) * options.batch_size * options.seq_length
                record: dict[str, Any] = {"step": step, "stage": stage, "tokens": tokens, "learning_rate": rate}
                record |= {name: float(value) for name, value in figures.items()}
                speed = (step - start) / (time.perf_counter() - began)
                record["tokens_per_second"] = speed * options.batch_size * options.seq_length
                if validate:
                    for name, data in stages.items():
                        record[f"{name}_valid_loss"] = valid_loss(state[0], data.valid, options.batch_size, fixed)
                metrics.write(record)
                bar.set_postfix(loss=f"{record['loss']:.3f}", tokens_s=f"{record['tokens_per_second']:,.0f}")
                told = {"valid_loss": record[f"{stage}_valid_loss"]} if validate else {}
                bar.write(line(record | told))
            if saving:
                checkpoints.save(step, state)
    if step < options.steps:
        print(f"stopped after step {step} of {options.steps}; the same command with --resume goes on from there.")
        raise KeyboardInterrupt
    stable = (schedule.decay_start - options.from_step) * options.batch_size * options.seq_length
    del state

    def finish() -> None:
        metrics.draw(options.out / "loss.png", max(stable, 0))
        save_model(options, config, raw, step)

    processes.once(finish)
    print(f"model in {options.out / 'model'}, loss curve in {options.out / 'loss.png'}")
