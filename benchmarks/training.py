"""Measure what fine-tuning takes: the loss in vocabulary chunks, packing, and a full step.

    python -m benchmarks.training --part loss --backend jax
    python -m benchmarks.training --part loss --backend mlx
    python -m benchmarks.training --part packing --backend jax --shape wide
    python -m benchmarks.training --part step --tokens 16

`loss`: memory and values of the loss in chunks, compared with the loss from all logits at once. In JAX, the whole LoRA
step of a released shape is compiled for a TPU, without a TPU. In MLX, the loss and its gradient are run. `packing`:
tokens per second of LoRA steps on examples with skewed lengths, one per row or packed. `step`: time and memory of a
full fine-tuning step in MLX, as on a CPU, and compiled as on a GPU.
Dims: B rows, T tokens, V vocabulary, D hidden.
"""

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import numpy as np

from benchmarks.models import shape_of
from benchmarks.timing import alternating
from minicpm_data.datasets.batches import Batches
from minicpm_data.datasets.examples import IGNORED, Example
from minicpm_data.training.options import LoraOptions
from weights_io import command_line
from weights_io.adapters import AdapterConfig
from weights_io.config import ModelConfig

RANK, ALPHA, TARGETS = 8, 32.0, ("q_proj", "v_proj")
VOCABULARY = 32768  # vocabulary of the loss in MLX; its head has width 32


@dataclass(frozen=True)
class Options:
    part: Literal["loss", "packing", "step"]
    """What to measure."""
    backend: Literal["jax", "mlx"] = "jax"
    """Backend to measure."""
    model: str = "minicpm-2b"
    """loss in JAX: the model whose shape is used."""
    topology: str = "v5e:1x1"
    """loss in JAX: the TPU to compile for."""
    rows: int = 4
    """Batch rows (B)."""
    tokens: int = 2048
    """Tokens of a row (T). packing: tokens of the longest row, at most 256."""
    logits: tuple[int, ...] = (2**26,)
    """loss: maximum number of logits at once."""
    shape: Literal["pico", "wide"] = "pico"
    """packing: the built-in model's shape, or two layers of MiniCPM-2B's width with its whole vocabulary."""
    examples: int = 32
    """packing: number of examples per epoch."""
    rounds: int = 5
    """packing and step: timed runs. The median is reported."""


def main(options: Options) -> None:
    """Measure the memory and time of fine-tuning."""
    if options.part == "step":
        mlx_step(options)
    elif options.part == "loss":
        (jax_loss if options.backend == "jax" else mlx_loss)(options)
    else:
        packing(options)


# The step in MLX


def mlx_step(options: Options) -> None:
    """Measure 80 narrow layers. MLX on a CPU holds the outputs of the next hundred kernels, which must be a small part
    of all kernels."""
    import mlx.core as mx

    from benchmarks.models import wide
    from minicpm_data.training.options import FullOptions
    from minicpm_mlx.model import initialize
    from minicpm_mlx.training import step as train
    from minicpm_mlx.training.trainer import Trainer

    config = ModelConfig.from_dict(wide(80, 500, hidden_size=192, intermediate_size=480))
    ids = np.random.default_rng(0).integers(3, 500, (1, options.tokens), np.int32)
    batch = {"ids": ids, "labels": ids, "segments": np.ones_like(ids)}
    print("| step | peak, of the masters | s a step |\n|---|---|---|")
    for name, compiled in (("as on a CPU", lambda function: function), ("compiled", mx.compile)):
        with mock.patch.object(train, "compiled", compiled):
            worker = Trainer(initialize(config, mx.random.key(0)), FullOptions())
        seconds = []
        for number in range(options.rounds + 1):
            began = time.perf_counter()
            worker.step([batch], 1e-5, number)
            mx.eval(worker.weights)
            seconds.append(time.perf_counter() - began)
            if number == 0:  # traced and compiled
                mx.reset_peak_memory()
        masters = sum(weight.nbytes for weight in worker.weights.values())
        print(f"| {name} | {mx.get_peak_memory() / masters:.2f} | {statistics.median(seconds[1:]):.2f} |")
        del worker


# The loss over the vocabulary


def one_layer(vocabulary: int, width: int) -> ModelConfig:
    """The config of a one-layer model. With weights and hidden states of standard deviation 1, its logits have standard
    deviation sqrt(D). Some tokens are then much likelier than others; otherwise all ways of computing the loss would
    agree."""
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        dim_model_base=width,
        initializer_range=1.0,
    )


def jax_loss(options: Options) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from minicpm_jax.model import abstract, initialize
    from minicpm_jax.parallel.chips import Topology
    from minicpm_jax.training import adapters, cross_entropy, losses, optimizers
    from minicpm_jax.training import step as train

    config = ModelConfig.from_dict(shape_of(options.model))
    chip = Topology.parse(options.topology).devices()[0]

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
        lambda base, key: adapters.init_lora_params(base, adapter, range(config.num_hidden_layers), key), base, key
    )
    optimizer = optimizers.optimizer("adamw", 0.01, 1.0, config)
    ids = jax.ShapeDtypeStruct((1, *shape), jnp.int32)
    state = matrices, jax.eval_shape(optimizer.init, matrices)
    step = on_chip((state, base, dict.fromkeys(("ids", "labels", "segments"), ids), jnp.float32(0), key))
    hidden = jax.ShapeDtypeStruct((*shape, config.hidden_size), jnp.bfloat16)
    alone = on_chip((hidden, base, jax.ShapeDtypeStruct(shape, jnp.int32)))
    told = {"trained": train.LoraFinetune(adapter.scale, adapter.dropout), "optimizer": optimizer}
    told["objective"] = losses.Objective(remat=True)

    # Compare the values on this machine, with the whole vocabulary and a narrow head.
    narrow = one_layer(config.vocab_size, 64)
    model, random = initialize(narrow, jax.random.key(0)), np.random.default_rng(0)
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
        cross_entropy.LOGITS = (
            2 * narrow.vocab_size * 5 if limit is not None else cross_entropy.LOGITS
        )  # seven chunks of five tokens
        found = of_hidden(losses.token_losses)(x, model, labels)
        difference = largest_difference(found, expected)
        cross_entropy.LOGITS = limit or cross_entropy.LOGITS
        small = of_hidden(losses.token_losses).lower(*alone).compile().memory_analysis()
        train.train_step.clear_cache()  # trace it again with the current token_losses
        whole = train.train_step.lower(*step, **told).compile().memory_analysis()
        in_all = whole.argument_size_in_bytes + whole.temp_size_in_bytes
        memory = (small.temp_size_in_bytes, whole.temp_size_in_bytes, in_all)
        figures = " | ".join(f"{x / 1e9:.3f} GB" for x in memory)
        at_once = min(limit or np.inf, options.rows * (options.tokens - 1) * config.vocab_size)
        print(f"| {named(limit)} | {at_once / 2**20:,.0f} Mi | {figures} | {difference:.0e} |", flush=True)


def mlx_loss(options: Options) -> None:
    import mlx.core as mx

    from minicpm_mlx.model import initialize
    from minicpm_mlx.training import cross_entropy

    config = one_layer(VOCABULARY, 32)
    model = initialize(config, mx.random.key(0))
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
            cross_entropy.LOGITS = limit
        found, taken, spent = (expected, *plain_took) if limit is None else measured(cross_entropy.token_losses)
        difference = largest_difference(found, expected)
        at_once = min(limit or whole, whole) / 2**20
        print(
            f"| {named(limit)} | {at_once:,.0f} Mi | {taken / 1e6:,.0f} MB | {spent:.1f} | {difference:.0e} |",
            flush=True,
        )


def named(limit: int | None) -> str:
    return "plain" if limit is None else "in chunks"


def largest_difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Largest difference, relative to the largest value of each array. It must be below 1e-5."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(found, expected, strict=True)]
    largest = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    assert largest < 1e-5, f"the loss in chunks is {largest} from the plain one"
    return largest


# Packing


def packing(options: Options) -> None:
    wide = options.shape == "wide"
    config = ModelConfig.from_dict(shape_of("minicpm-2b") | {"num_hidden_layers": 2} if wide else shape_of("pico"))
    width = min(options.tokens, 256)
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(width / 6), 0.9, options.examples).astype(int), 8, width)
    ids = [random.integers(3, config.vocab_size, length).astype(np.int32) for length in lengths]
    examples = [Example(i, np.arange(len(i)) > len(i) // 4) for i in ids]
    worker, wait = trainer(options, config)
    feeds: dict[str, list[dict[str, np.ndarray]]] = {}
    for name in ("one example each", "packed"):
        batches = Batches(examples, options.rows, width, 0, pack=name == "packed", row_width=worker.row_width)
        feeds[name] = [batches[n].arrays() for n in range(batches.per_epoch)]
    seconds = alternating({name: functools.partial(epoch, worker, wait, feeds[name]) for name in feeds}, options.rounds)
    print("| rows | steps per epoch | positions, padding | s per step | tokens per second | gain, predicted | gain |")
    print("|---|---|---|---|---|---|---|")
    rates = {}
    for name, feed in feeds.items():
        tokens = sum(int((batch["segments"] > 0).sum()) for batch in feed)
        computed = sum(batch["ids"].size for batch in feed)
        rates[name] = tokens / computed, tokens / seconds[name]  # only the padding differs
        (share, rate), (share_before, rate_before) = rates[name], rates["one example each"]
        print(
            f"| {name} | {len(feed)} | {computed:,}, {1 - share:.0%} | {seconds[name] / len(feed):.2f}"
            f" | {rate:,.0f} | {share / share_before:.2f} | {rate / rate_before:.2f} |"
        )


def trainer(options: Options, config: ModelConfig) -> tuple[Any, Callable[[], object]]:
    """A LoRA trainer on random weights, and a function that waits for its last step."""
    chosen = LoraOptions(rank=RANK, alpha=ALPHA, targets=TARGETS, batch_size=options.rows)
    made = importlib.import_module(f"minicpm_{options.backend}.training.trainer").Trainer
    initialize = importlib.import_module(f"minicpm_{options.backend}.model").initialize
    if options.backend == "jax":
        import jax

        worker = made(initialize(config, jax.random.key(0)), chosen)
        return worker, lambda: jax.block_until_ready(worker.state)
    import mlx.core as mx

    worker = made(initialize(config, mx.random.key(0)), chosen)
    return worker, lambda: mx.eval(worker.weights, worker.optimizer.state)


def epoch(worker: Any, wait: Callable[[], object], batches: Sequence[dict[str, np.ndarray]]) -> None:
    for number, batch in enumerate(batches):
        worker.step([batch], 1e-5, number)
    wait()


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.training")
