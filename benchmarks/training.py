"""What fine-tuning takes: the loss over the vocabulary, `mlx_lm.lora` beside ours, and packing.

    python -m benchmarks.training --part loss --backend jax
    python -m benchmarks.training --part loss --backend mlx
    python -m benchmarks.training --part peer
    python -m benchmarks.training --part packing --backend jax --shape wide

`loss`: memory and numbers of the loss in chunks beside those of all logits at once. In JAX the whole LoRA step of a
released shape is compiled for a TPU, which needs none; in MLX loss and gradient run. `peer`: both programs train on
one small Llama, each run in a process of its own, in turn; the first epoch warms up, the second is timed. `packing`:
tokens a second of LoRA steps on examples whose lengths are skewed, each in a row of its own or packed.
Dims: B rows, T tokens, V vocabulary, D hidden.
"""

import functools
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from benchmarks.timing import alternating
from minicpm_data import finetuning
from minicpm_data.batches import IGNORED, Batches
from minicpm_data.examples import Example
from minicpm_data.finetune_options import LoraOptions
from weights_io import catalog, command_line
from weights_io.adapters import AdapterConfig
from weights_io.config import ModelConfig
from weights_io.errors import InputError

PICO = Path(__file__).parents[1] / "minicpm_data" / "pico"
RANK, ALPHA, TARGETS = 8, 32.0, ("q_proj", "v_proj")
PEERS = ("ours", "ours, packed", "mlx_lm")
# A Llama of 5 million numbers, most of which are head and embedding.
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
# Both programs make the same ids of it.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<用户>' + message['content'] + '<AI>' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Options:
    part: Literal["loss", "peer", "packing"]
    """What is measured."""
    backend: Literal["jax", "mlx"] = "jax"
    """Which of the two runs."""
    model: str = "minicpm-2b"
    """Of the loss in JAX: whose shape."""
    topology: str = "v5e:1x1"
    """Of the loss in JAX: the TPU that is compiled for."""
    rows: int = 4
    """B."""
    tokens: int = 2048
    """T; of packing and peer the longest row, 256 at most."""
    logits: tuple[int, ...] = (2**27,)
    """Of the loss: most logits at once."""
    shape: Literal["pico", "wide"] = "pico"
    """Of packing: the built-in model's shape, or two layers as wide as MiniCPM-2B with its whole vocabulary."""
    examples: int = 32
    """Of packing and peer: how many there are, an epoch."""
    rounds: int = 5
    """Timed runs, of which the median counts."""
    here: int | None = None
    """Of peer: run one of the programs in this process; print what it took."""
    folder: Path = Path("unknown")
    """Of peer: where model and data are, for --here."""


def main(options: Options) -> None:
    """Measure what fine-tuning takes in memory and time."""
    if options.part == "loss":
        (jax_loss if options.backend == "jax" else mlx_loss)(options)
    elif options.part == "packing":
        packing(options)
    elif options.here is not None:
        run_peer(options, PEERS[options.here])
    else:
        peer(options)


def shape_of(name: str, **changes: Any) -> ModelConfig:
    """The config of a model of the catalogue."""
    entry = catalog.find(name)
    raw = json.loads((PICO / "config.json").read_text()) if name == "pico" else entry and entry.config
    if raw is None:
        raise InputError(f"the shape of {name} is not known; give a model of the catalogue whose is.")
    return ModelConfig.from_dict({**raw, **changes})


# The loss over the vocabulary


def jax_loss(options: Options) -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from minicpm_jax import adapters, losses, train
    from minicpm_jax.model import abstract, initialise

    config = shape_of(options.model)
    try:
        chip = topologies.get_topology_desc(
            platform="tpu", topology_name=options.topology, chips_per_host_bounds=(1, 1, 1)
        ).devices[0]
    except (RuntimeError, ValueError) as error:
        raise InputError("compiling for a TPU needs libtpu: pip install 'minicpm-jax-mlx[fit]'.") from error

    def plain(model, hidden, labels):
        logits, labels = model.head(hidden[:, :-1]), labels[:, 1:]
        right = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return jnp.pad(jnp.where(labels == IGNORED, 0, jax.nn.logsumexp(logits, axis=-1) - right), [(0, 0), (1, 0)])

    def on_chip(tree):
        sharding = SingleDeviceSharding(chip)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    chunked, shape = losses.token_losses, (options.rows, options.tokens)
    adapter = AdapterConfig(RANK, ALPHA, 0.1, False, TARGETS, options.model)
    base = abstract(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    matrices = jax.eval_shape(
        lambda base, key: adapters.initial(base, adapter, range(config.num_hidden_layers), key), base, key
    )
    optimiser = train.optimizer("adamw", 0.01, 1.0)
    ids = jax.ShapeDtypeStruct((1, *shape), jnp.int32)
    state = matrices, jax.eval_shape(optimiser.init, matrices)
    step = on_chip((state, base, dict.fromkeys(("ids", "labels", "segments"), ids), jnp.float32(0), key))
    hidden = jax.ShapeDtypeStruct((*shape, config.hidden_size), jnp.bfloat16)
    alone = on_chip((hidden, base, jax.ShapeDtypeStruct(shape, jnp.int32)))
    told = {"trained": train.LowRankWeights(adapter.scale, adapter.dropout), "optimiser": optimiser}
    told["objective"] = losses.Objective(remat=True)

    # The numbers, on this machine: the whole vocabulary and a narrow head.
    narrow = ModelConfig(vocab_size=config.vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    model, random = initialise(narrow, jax.random.key(0)), np.random.default_rng(0)
    x, labels = random.normal(size=(2, 33, 64)).astype(np.float32), random.integers(0, narrow.vocab_size, (2, 33))
    labels = np.where(labels % 3 == 0, IGNORED, labels)

    def of_hidden(function):
        def total(hidden, model, labels):
            losses = function(model, hidden, labels)
            return jnp.sum(losses), losses

        return jax.jit(jax.grad(total, has_aux=True))

    expected = of_hidden(plain)(x, model, labels)
    print(
        "| loss | most logits at once | loss alone, temporaries | LoRA step, temporaries | step in all | difference |"
    )
    print("|---|---|---|---|---|---|")
    for limit in (*options.logits, None):
        losses.token_losses = plain if limit is None else chunked
        losses.LOGITS = 2 * narrow.vocab_size * 5 if limit is not None else losses.LOGITS  # seven chunks of five tokens
        found = of_hidden(losses.token_losses)(x, model, labels)
        difference = largest_difference(found, expected)
        losses.LOGITS = limit or losses.LOGITS
        small = of_hidden(losses.token_losses).lower(*alone).compile().memory_analysis()
        train.train_step.clear_cache()  # it is traced with what token_losses is now
        whole = train.train_step.lower(*step, **told).compile().memory_analysis()
        in_all = whole.argument_size_in_bytes + whole.temp_size_in_bytes
        memory = (small.temp_size_in_bytes, whole.temp_size_in_bytes, in_all)
        figures = " | ".join(f"{x / 1e9:.3f} GB" for x in memory)
        at_once = min(limit or np.inf, options.rows * (options.tokens - 1) * config.vocab_size)
        print(f"| {named(limit)} | {at_once / 2**20:,.0f} Mi | {figures} | {difference:.0e} |", flush=True)


def mlx_loss(options: Options) -> None:
    import mlx.core as mx

    from minicpm_mlx import losses
    from minicpm_mlx.model import initialise

    config = ModelConfig(vocab_size=SMALL["vocab_size"], hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    model = initialise(config, mx.random.key(0))
    model.freeze()
    hidden = mx.random.normal((options.rows, options.tokens, config.hidden_size), key=mx.random.key(1))
    labels = mx.random.randint(0, config.vocab_size, (options.rows, options.tokens), key=mx.random.key(2))
    labels = mx.where(labels % 3 == 0, IGNORED, labels)
    mx.eval(model.parameters(), hidden, labels)

    def plain(model, hidden, labels):
        logits, labels = model.head(hidden[:, :-1]), labels[:, 1:]
        right = mx.take_along_axis(logits, mx.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return mx.pad(mx.where(labels == IGNORED, 0, mx.logsumexp(logits, axis=-1) - right), [(0, 0), (1, 0)])

    def measured(function):
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before, began = mx.get_active_memory(), time.perf_counter()
        loss, gradient = mx.value_and_grad(lambda hidden: function(model, hidden, labels).sum())(hidden)
        mx.eval(loss, gradient)
        spent = time.perf_counter() - began
        return (np.array(gradient), np.array(loss)), mx.get_peak_memory() - before, spent

    expected, *plain_took = measured(plain)
    whole = options.rows * (options.tokens - 1) * config.vocab_size
    print("| loss | most logits at once | peak beyond what is given | seconds | difference |")
    print("|---|---|---|---|---|")
    for limit in (*options.logits, None):
        if limit is not None:
            losses.LOGITS = limit
        found, taken, spent = (expected, *plain_took) if limit is None else measured(losses.token_losses)
        difference = largest_difference(found, expected)
        at_once = min(limit or whole, whole) / 2**20
        print(
            f"| {named(limit)} | {at_once:,.0f} Mi | {taken / 1e6:,.0f} MB | {spent:.1f} | {difference:.0e} |",
            flush=True,
        )


def named(limit: int | None) -> str:
    return "plain" if limit is None else "in chunks"


def largest_difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """In shares of the largest number of each array; it must be below 1e-5."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(found, expected, strict=True)]
    largest = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    assert largest < 1e-5, f"the loss in chunks is {largest} from the plain one"
    return largest


# mlx_lm beside ours


def peer(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder), options.examples)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in PEERS}
        for _ in range(options.rounds):
            for index, name in enumerate(PEERS):
                command = [sys.executable, "-m", "benchmarks.training", "--part", "peer", "--folder", folder]
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
    """A random Llama with the built-in tokenizer, and examples of which most are short and a few long."""
    from weights_io.files.safetensors import Computed
    from weights_io.llama_format import to_llama
    from weights_io.parameters import parameters
    from weights_io.write import save_checkpoint

    config, random = ModelConfig.from_dict(SMALL), np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for p in parameters(config):
        for name in p.tensors(config):
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
    """What each step was given, and when it began."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def add(self, places: int, tokens: int, targets: int, wrong: int) -> None:
        """``wrong``: how many of the targets are padding."""
        counts = {"places": places, "tokens": tokens, "targets": targets, "wrong": wrong}
        self.steps.append({"began": time.perf_counter(), **counts})

    def epoch(self, steps: int) -> dict[str, float]:
        """Sums over the second epoch."""
        second = self.steps[steps : 2 * steps]
        sums = {name: int(sum(step[name] for step in second)) for name in ("places", "tokens", "targets", "wrong")}
        seconds = self.steps[2 * steps]["began"] - self.steps[steps]["began"]
        return {"steps": steps, "seconds": seconds, **sums}


def run_peer(options: Options, name: str) -> None:
    """Two epochs and a step more; prints the counts and seconds of the second one, and the peak of memory."""
    import mlx.core as mx

    ledger = Ledger()
    with tempfile.TemporaryDirectory() as out:
        run = mlx_lm_run if name == "mlx_lm" else functools.partial(our_run, pack=name.endswith("packed"))
        steps = run(options, Path(out), ledger)
    print(json.dumps({"peak": mx.get_peak_memory(), **ledger.epoch(steps)}))


def our_run(options: Options, out: Path, ledger: Ledger, *, pack: bool) -> int:
    import mlx.core as mx

    from minicpm_data.examples import load_split
    from minicpm_mlx.generate import backend
    from minicpm_mlx.loading import load
    from minicpm_mlx.trainer import Trainer

    class Watched(Trainer):
        def step(self, batches, rate, number):
            mx.eval(self.weights, self.optimiser.state)  # of the step before
            segments, labels = batches[0]["segments"], batches[0]["labels"]
            wrong = int(((labels != IGNORED) & (segments == 0)).sum())
            ledger.add(segments.size, int((segments > 0).sum()), int((labels != IGNORED).sum()), wrong)
            return super().step(batches, rate, number)

    width, data = min(options.tokens, 256), options.folder / "data" / "train.jsonl"
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
            end = np.minimum(last, width - 1)  # steps up to ``last``, which is a place behind the row's last token
            trained = np.maximum(end - first + 1, 0) - (first == 0)
            ledger.add(batch.size, int(last.sum()), int(trained.sum()), int((last < width).sum()))
            yield batch, lengths

    def run(model, args, optimizer, train_dataset, val_dataset, training_callback):
        train(model, optimizer, train_dataset, None, args, iterate_batches=watched)

    lora.train = run  # which then does not stop for validation
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
        "max_seq_length": min(options.tokens, 256),
        "learning_rate": 5e-5,
        "optimizer": "adamw",
        "adapter_path": str(out),
        "steps_per_report": 10**6,
        "save_every": 10**6,
        "lora_parameters": {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": keys},
    }
    lora.run(SimpleNamespace(**{**lora.CONFIG_DEFAULTS, **changed}))
    return steps


# Packing


def packing(options: Options) -> None:
    config = shape_of("minicpm-2b", num_hidden_layers=2) if options.shape == "wide" else shape_of("pico")
    width = min(options.tokens, 256)
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(width / 6), 0.9, options.examples).astype(int), 8, width)
    ids = [random.integers(3, config.vocab_size, length).astype(np.int32) for length in lengths]
    examples = [Example(i, np.arange(len(i)) > len(i) // 4) for i in ids]
    worker, wait = trainer(options, config)
    feeds: dict[str, list[dict[str, np.ndarray]]] = {}
    for name in ("a row each", "packed"):
        batches = Batches(examples, options.rows, width, 0, pack=name == "packed")
        feeds[name] = [finetuning.arrays(batches[n], None) for n in range(batches.per_epoch)]
    seconds = alternating({name: functools.partial(epoch, worker, wait, feeds[name]) for name in feeds}, options.rounds)
    print("| rows | steps an epoch | places, padding | seconds a step | tokens a second | gain, predicted | gain |")
    print("|---|---|---|---|---|---|---|")
    rates = {}
    for name, feed in feeds.items():
        tokens = sum(int((batch["segments"] > 0).sum()) for batch in feed)
        computed = sum(places(options.backend, batch) for batch in feed)
        rates[name] = tokens / computed, tokens / seconds[name]  # padding is all that differs
        (share, rate), (share_before, rate_before) = rates[name], rates["a row each"]
        print(
            f"| {name} | {len(feed)} | {computed:,}, {1 - share:.0%} | {seconds[name] / len(feed):.2f}"
            f" | {rate:,.0f} | {share / share_before:.2f} | {rate / rate_before:.2f} |"
        )


def trainer(options: Options, config: ModelConfig) -> tuple[Any, Callable[[], object]]:
    """A trainer of adapters on random weights, and what waits for its last step."""
    chosen = LoraOptions(rank=RANK, alpha=ALPHA, targets=TARGETS, batch_size=options.rows)
    made = importlib.import_module(f"minicpm_{options.backend}.trainer").Trainer
    initialise = importlib.import_module(f"minicpm_{options.backend}.model").initialise
    if options.backend == "jax":
        import jax

        worker = made(initialise(config, jax.random.key(0)), chosen)
        return worker, lambda: jax.block_until_ready(worker.state)
    import mlx.core as mx

    worker = made(initialise(config, mx.random.key(0)), chosen)
    return worker, lambda: mx.eval(worker.weights, worker.optimiser.state)


def epoch(worker: Any, wait: Callable[[], object], batches: Sequence[dict[str, np.ndarray]]) -> None:
    for number, batch in enumerate(batches):
        worker.step([batch], 1e-5, number)
    wait()


def places(backend: str, batch: dict[str, np.ndarray]) -> int:
    """Places that are computed: JAX rounds a row's width up to one of few."""
    if backend == "mlx":
        return batch["ids"].size
    from minicpm_jax.trainer import bucket

    return batch["ids"].shape[0] * bucket(batch["ids"].shape[1])


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.training")
