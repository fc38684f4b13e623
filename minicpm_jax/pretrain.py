"""Pretraining: muP, AdamW and the warm-up-stable-decay schedule, from a config to a checkpoint.

    python -m minicpm_jax.pretrain --config config.json --tokenizer DIR --data DIR --out DIR --steps 5000 ...

``--data`` holds ``stable/`` and ``decay/``, each with ``train.jsonl`` and ``valid.jsonl`` of {"text"} or {"messages"}
documents; the decay stage reads the second, as MiniCPM mixes chat data in there (arXiv 2404.06395, section 4).
``--out`` gets ``metrics.jsonl``, ``loss.png``, ``checkpoints/`` (orbax) and, at the end, ``model/`` (Hugging Face
layout). Interrupted by Ctrl-C, a kill or a power cut, the same command goes on where the last checkpoint was.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minicpm_data.schedules import Decay, WarmupStableDecay
from weights_io import command_line
from weights_io.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from weights_io.config import ModelConfig


@dataclass(frozen=True)
class Options:
    config: Path
    """config.json of the model to make."""
    tokenizer: Path
    """Folder of the tokenizer."""
    data: Path
    """Folder with stable/ and decay/, each with train.jsonl and valid.jsonl."""
    out: Path
    """Folder for checkpoints, metrics and the finished model."""
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
    """Compute in this; masters and moments are float32. Default: bfloat16 on a TPU or GPU, float32 on a CPU."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the finished model."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, a third more work."""
    save_every: int = 500
    """Steps between checkpoints."""
    valid_every: int = 250
    """Steps between validation losses."""
    seed: int = 0
    """Of initialisation and data order."""


def pretrain(options: Options) -> None:
    """Train a MiniCPM from nothing (or go on with an interrupted run)."""
    check(options)
    import jax
    import orbax.checkpoint as ocp
    from tqdm import tqdm

    from minicpm_data import load_tokenizer
    from minicpm_data.packing import batches, pack
    from minicpm_data.tokenizer import check_vocab
    from minicpm_jax import train
    from minicpm_jax.model import initialise
    from weights_io.config import ModelConfig

    config = ModelConfig.from_file(options.config)
    tokenizer = load_tokenizer(options.tokenizer)
    check_vocab(tokenizer, config.vocab_size)
    schedule = WarmupStableDecay(
        options.learning_rate,
        options.steps,
        options.warmup_steps,
        options.decay_steps,
        options.decay,
        options.half_life,
    )
    stages = {}
    for stage in ("stable", "decay"):
        windows, valid = (
            pack(options.data / stage / f"{split}.jsonl", tokenizer, options.seq_length) for split in ("train", "valid")
        )
        stages[stage] = (batches(windows, options.batch_size, options.seed), valid)
        print(f"{stage}: {windows.size:,} tokens in windows of {options.seq_length}")

    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    optimiser = train.optimizer(config, options.beta1, options.beta2, options.weight_decay, options.clip)
    weights = train.weights_of(initialise(config, jax.random.key(options.seed)))
    state = (weights, optimiser.init(weights))
    options.out.mkdir(parents=True, exist_ok=True)
    manager = ocp.CheckpointManager(
        (options.out / "checkpoints").resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    start = manager.latest_step() or 0
    if start:
        state = manager.restore(
            start, args=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
        )
        print(f"going on after step {start}")
    metrics = Metrics(options.out / "metrics.jsonl", start)
    fixed: dict[str, Any] = {"config": config, "bos_token_id": tokenizer.bos_token_id, "dtype": dtype}
    tokens_a_step = options.batch_size * options.seq_length
    step = start
    began = time.perf_counter()
    try:
        with tqdm(total=options.steps, initial=start, unit="step") as bar:
            while step < options.steps:
                # The decay stage reads its own data from its first batch on.
                stage, offset = ("decay", schedule.decay_start) if step >= schedule.decay_start else ("stable", 0)
                data, valid = stages[stage]
                rate = schedule(step)
                state, figures = train.pretrain_step(
                    state, data[step - offset], rate, optimiser=optimiser, remat=options.remat, **fixed
                )
                step += 1
                record = {"step": step, "stage": stage, "tokens": step * tokens_a_step, "learning_rate": rate}
                if step % options.valid_every == 0 or step == options.steps:
                    record["valid_loss"] = valid_loss(state[0], valid, options.batch_size, fixed)
                if "valid_loss" in record or step % 10 == 0:
                    speed = (step - start) * tokens_a_step / (time.perf_counter() - began)
                    record |= {name: float(value) for name, value in figures.items()} | {"tokens_per_second": speed}
                    metrics.write(record)
                    bar.set_postfix(loss=f"{record['loss']:.3f}", tokens_s=f"{speed:,.0f}", refresh=False)
                bar.update()
                if step % options.save_every == 0 or step == options.steps:
                    manager.save(step, args=ocp.args.StandardSave(state))
    except KeyboardInterrupt:
        if step > (manager.latest_step() or 0):
            manager.save(step, args=ocp.args.StandardSave(state))
        print(f"\nstopped after step {step}; the same command goes on from here.")
        raise
    finally:
        manager.wait_until_finished()
        manager.close()
    metrics.draw(options.out / "loss.png", schedule.decay_start)
    save_model(options, config, state[0])
    print(f"model in {options.out / 'model'}, loss curve in {options.out / 'loss.png'}")


def check(options: Options) -> None:
    """Refuse what cannot work before anything is imported or written."""
    for name in ("steps", "batch_size", "save_every", "valid_every"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1.")
    if options.seq_length < 2:
        raise InputError(f"--seq-length is {options.seq_length}; a window needs at least 2 tokens.")
    if (options.out / "model").exists() and not (options.out / "checkpoints").exists():
        raise InputError(f"{options.out / 'model'} exists already; choose another --out.")


def valid_loss(weights: dict[str, Any], windows: "np.ndarray", batch_size: int, fixed: dict[str, Any]) -> float:
    """Mean loss over the full batches of at most 16 batches of the validation windows."""
    from minicpm_jax.train import packed_evaluation

    width = min(batch_size, len(windows))
    starts = range(0, min(len(windows), 16 * width) - width + 1, width)
    losses = [packed_evaluation(weights, windows[i : i + width], **fixed) for i in starts]
    return float(sum(losses) / len(losses))


def save_model(options: Options, config: "ModelConfig", weights: dict[str, Any]) -> None:
    """The finished model in Hugging Face layout, with its tokenizer."""
    import shutil

    import numpy as np

    from weights_io.write import save_checkpoint, unstacked

    if (options.out / "model").exists():
        shutil.rmtree(options.out / "model")
    raw = json.loads(options.config.read_text(encoding="utf-8"))
    arrays = {name: np.asarray(value) for name, value in weights.items()}
    save_checkpoint(
        options.out / "model",
        config,
        unstacked(config, arrays),
        raw_config=raw,
        copy_from=options.tokenizer,
        dtype=options.save_dtype,
    )


class Metrics:
    """``metrics.jsonl``: one JSON object a line. A resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, start: int):
        self.path = path
        kept = [r for r in read_metrics(path) if r["step"] <= start] if path.exists() else []
        path.write_text("".join(json.dumps(r) + "\n" for r in kept))

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def draw(self, picture: Path, decay_start: int) -> None:
        """Loss against tokens, with the drop at the decay."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        records = read_metrics(self.path)
        tokens = [r["tokens"] / 1e6 for r in records]
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        axes.plot(tokens, [r["loss"] for r in records], lw=0.8, alpha=0.6, label="training loss")
        valid = [(r["tokens"] / 1e6, r["valid_loss"]) for r in records if "valid_loss" in r]
        axes.plot(*zip(*valid, strict=True), "o-", ms=3, label="validation loss of the stage")
        boundary = next((r["tokens"] / 1e6 for r in records if r["step"] > decay_start), None)
        if boundary is not None:
            axes.axvline(boundary, color="grey", ls="--", lw=0.8)
            axes.annotate("decay begins", (boundary, axes.get_ylim()[1]), ha="right", va="top", rotation=90, fontsize=8)
        axes.set(xlabel="million tokens", ylabel="cross entropy (nats per token)", yscale="log")
        rates = axes.twinx()
        rates.plot(tokens, [r["learning_rate"] for r in records], color="tab:red", lw=0.8, alpha=0.5)
        rates.set_ylabel("learning rate", color="tab:red")
        axes.legend()
        figure.savefig(picture, dpi=120)
        plt.close(figure)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


if __name__ == "__main__":
    command_line.run(pretrain, Options, "python -m minicpm_jax.pretrain")
