"""Compare `minicpm_mlx.lora` and `mlx_lm.lora` on a small Llama in float32, with mostly short examples.

    python -m benchmarks.lora_peer

Each run has a process of its own, and the programs take turns. The first epoch warms up. The second epoch is counted
and timed, from the start of its first step to the start of the step after its last one. The peak is MLX's peak memory
over the whole run, including the weights.
"""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from minicpm_data.datasets.batches import Batches
from minicpm_data.datasets.examples import IGNORED
from minicpm_data.training import finetuning
from minicpm_data.training.options import LoraOptions
from weights_io import command_line
from weights_io.config import ModelConfig

PICO = Path(__file__).parents[1] / "weights_io" / "pico"
RANK, ALPHA, TARGETS = 8, 32.0, ("q_proj", "v_proj")
PEERS = ("ours", "ours, compiled", "ours, packed", "mlx_lm")  # "compiled": as on a GPU, but with the C++ compiler
# A Llama with 5 million parameters, most of them in the head and the embedding.
SMALL: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "scale_emb": 12.0,
    "scale_depth": 1.4,
    "dim_model_base": 32,
}
# Both programs render this template to the same token ids.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<用户>' + message['content'] + '<AI>' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Options:
    rows: int = 4
    """Batch size."""
    tokens: int = 144
    """Tokens of the longest row, and of packed rows."""
    examples: int = 24
    """Examples per epoch."""
    rounds: int = 5
    """Runs of each program. The median is reported."""
    here: int | None = None
    """Index of a program to run in this process. Its figures are printed."""
    folder: Path = Path("unknown")
    """Folder of the model and the data for --here."""


def main(options: Options) -> None:
    """Train the same adapters on the same examples with minicpm_mlx.lora and mlx_lm.lora, in turn."""
    if options.here is not None:
        run_here(options, PEERS[options.here])
        return
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder), options.examples)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in PEERS}
        for _ in range(options.rounds):
            for index, name in enumerate(PEERS):
                command = [sys.executable, "-m", "benchmarks.lora_peer", "--folder", folder]
                command += ["--here", str(index), "--rows", str(options.rows), "--tokens", str(options.tokens)]
                command += ["--examples", str(options.examples)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(
        "| program | steps an epoch | padding | targets trained, of them padding | peak | s a step | tokens a second |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, found in runs.items():
        run, seconds = found[0], statistics.median(each["seconds"] for each in found)
        print(
            f"| {name} | {run['steps']} | {1 - run['tokens'] / run['places']:.0%} | {run['targets']:,}, {run['wrong']}"
            f" | {statistics.median(each['peak'] for each in found) / 1e6:,.0f} MB"
            f" | {seconds / run['steps']:.2f} | {run['tokens'] / seconds:,.0f} |"
        )


def write_world(folder: Path, count: int) -> None:
    """Write a random Llama with the built-in tokenizer, and training examples: most of them short, a few long."""
    from weights_io.files.safetensors import Computed
    from weights_io.llama_format import to_llama
    from weights_io.parameters import parameters
    from weights_io.write import save_checkpoint

    config, random = ModelConfig.from_dict(SMALL), np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for p in parameters(config):
        for name in p.hf_names(config):
            array = random.normal(0, p.init_std(config), p.tensor_shape(config)).astype(np.float32)
            array = np.ones_like(array) if p.init == "ones" else array
            tensors[name] = Computed(array.shape, array.dtype, functools.partial(np.asarray, array))
    llama, folded = to_llama(config, tensors)
    told = json.loads((PICO / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    files: dict[str, str | bytes] = {"tokenizer_config.json": json.dumps(told)}
    files["tokenizer.json"] = (PICO / "tokenizer.json").read_bytes()
    save_checkpoint(folder / "model", llama, folded, raw_config=SMALL, extra_files=files)
    words = "the sea is blue and a small dog sat by its door in rain while we ate bread".split()
    lengths = np.minimum(random.lognormal(2.7, 0.9, count).astype(int) + 1, 120)
    lines = [
        {"prompt": " ".join(random.choice(words, 5)), "completion": " ".join(random.choice(words, length))}
        for length in lengths
    ]
    (folder / "data").mkdir()
    for name in ("train", "valid"):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Ledger:
    """Records the start time and the token counts of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def add(self, places: int, tokens: int, targets: int, wrong: int) -> None:
        """Record a step. ``places``: positions with padding; ``wrong``: targets that are padding."""
        counts = {"places": places, "tokens": tokens, "targets": targets, "wrong": wrong}
        self.steps.append({"began": time.perf_counter(), **counts})

    def epoch(self, steps: int) -> dict[str, float]:
        """The sums and the seconds of the second epoch."""
        second = self.steps[steps : 2 * steps]
        sums = {name: int(sum(step[name] for step in second)) for name in ("places", "tokens", "targets", "wrong")}
        seconds = self.steps[2 * steps]["began"] - self.steps[steps]["began"]
        return {"steps": steps, "seconds": seconds, **sums}


def run_here(options: Options, name: str) -> None:
    """Run two epochs and one more step. Print counts and seconds of the second epoch, and the peak memory."""
    import mlx.core as mx

    from minicpm_mlx.training import step as train

    ledger, compiled = Ledger(), mx.compile if name.endswith("compiled") else train.compiled
    with tempfile.TemporaryDirectory() as out, mock.patch.object(train, "compiled", compiled):
        run = mlx_lm_run if name == "mlx_lm" else functools.partial(our_run, pack=name.endswith("packed"))
        steps = run(options, Path(out), ledger)
    print(json.dumps({"peak": mx.get_peak_memory(), **ledger.epoch(steps)}))


def our_run(options: Options, out: Path, ledger: Ledger, *, pack: bool) -> int:
    import mlx.core as mx

    from minicpm_data.datasets.examples import load_split
    from minicpm_mlx.backend import backend
    from minicpm_mlx.loading import load
    from minicpm_mlx.training.trainer import Trainer

    class Watched(Trainer):
        def step(self, batches, rate, number):
            mx.eval(self.weights, self.optimizer.state)  # wait for the step before
            segments, labels = batches[0]["segments"], batches[0]["labels"]
            wrong = int(((labels != IGNORED) & (segments == 0)).sum())
            ledger.add(segments.size, int((segments > 0).sum()), int((labels != IGNORED).sum()), wrong)
            return super().step(batches, rate, number)

    width, data = options.tokens, options.folder / "data" / "train.jsonl"
    model = str(options.folder / "model")
    tokenizer = load(model)[1]
    assert tokenizer is not None
    split = load_split(data, "train", tokenizer, width)
    assert split is not None
    steps = Batches(split.examples, options.rows, width, 0, pack=pack).per_epoch
    chosen = LoraOptions(
        model=model,
        data=data,
        iters=2 * steps + 1,
        batch_size=options.rows,
        max_seq_length=width,
        pack=pack,
        rank=RANK,
        alpha=ALPHA,
        dropout=0.0,
        targets=TARGETS,
        dtype="float32",
        adapter_path=out / "adapter",
        save_every=10**6,
        steps_per_report=10**6,
    )
    finetuning.finetune(chosen, backend, Watched)
    return steps


def mlx_lm_run(options: Options, out: Path, ledger: Ledger) -> int:
    from mlx_lm import lora
    from mlx_lm.tuner.trainer import iterate_batches, train

    def watched(*args, **kwargs):
        for batch, lengths in iterate_batches(*args, **kwargs):
            width = batch.shape[1]
            first, last = np.array(lengths).T
            end = np.minimum(last, width - 1)  # mlx_lm trains positions up to ``last``, one past the last token
            trained = np.maximum(end - first + 1, 0) - (first == 0)
            ledger.add(batch.size, int(last.sum()), int(trained.sum()), int((last < width).sum()))
            yield batch, lengths

    def run(model, args, optimizer, train_dataset, val_dataset, training_callback):
        train(model, optimizer, train_dataset, None, args, iterate_batches=watched)

    lora.train = run  # passes no validation data, so training does not stop for it
    steps = options.examples // options.rows
    keys = [f"self_attn.{target}" for target in TARGETS]
    changed = {
        "model": str(options.folder / "model"),
        "data": str(options.folder / "data"),
        "train": True,
        "mask_prompt": True,
        "num_layers": SMALL["num_hidden_layers"],
        "batch_size": options.rows,
        "iters": 2 * steps + 1,
        "max_seq_length": options.tokens,
        "learning_rate": 5e-5,
        "optimizer": "adamw",
        "adapter_path": str(out),
        "steps_per_report": 10**6,
        "save_every": 10**6,
        "lora_parameters": {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": keys},
    }
    lora.run(SimpleNamespace(**{**lora.CONFIG_DEFAULTS, **changed}))
    return steps


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.lora_peer")
