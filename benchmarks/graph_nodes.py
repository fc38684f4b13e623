"""Count graph nodes of a decode step and of a training step in MLX: our model, and the minicpm model of `mlx_lm`.

    python -m benchmarks.graph_nodes --layers 40

Each node launches at least one kernel. The nodes are counted in the graph that MLX exports for this device. On a CPU
the norms, RoPE and attention have many nodes each; on a GPU they have one. Training is LoRA of rank 8 on q_proj and
v_proj of all layers, with AdamW. It is compiled here, as on a GPU.
"""

import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.models import random_model, wide
from weights_io import command_line
from weights_io.config import ModelConfig

RANK, ALPHA, TARGETS = 8, 32.0, ("q_proj", "v_proj")
OF_THEIRS: tuple[str, ...] = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
OF_THEIRS += ("num_key_value_heads", "rms_norm_eps", "scale_depth", "scale_emb", "dim_model_base", "rope_theta")


@dataclass(frozen=True)
class Options:
    layers: int = 40
    """Layers of the model. The model is narrow, because the graph is the same at any width."""


def main(options: Options) -> None:
    """Count the nodes, and print a table."""
    narrow = {"hidden_size": 96, "intermediate_size": 240, "tie_word_embeddings": False}
    _, model = random_model("mlx", wide(options.layers, 256, **narrow), join=False)
    table("decode", {name: nodes for name, (_, nodes) in steps(model)}, options.layers)
    table("training", dict(training_steps(model.config)), options.layers)


def table(kind: str, counts: dict[str, int], layers: int) -> None:
    print(f"| {kind} step of | nodes | of mlx_lm's | a layer |\n|---|---|---|---|")
    for name, nodes in counts.items():
        print(f"| {name} | {nodes:,} | {nodes / counts['mlx_lm']:.2f} | {nodes / layers:.1f} |")
    print()


def steps(model: Any) -> Iterator[tuple[str, tuple[Any, int]]]:
    """Yield name, logits and node count of the decode step after four tokens: for `mlx_lm` with the weights of
    ``model``, for ``model``, and for ``model`` with fused products (it stays fused)."""
    from mlx.utils import tree_flatten

    from minicpm_mlx.layers.fused_linear import fuse

    theirs = peer(model.config)
    theirs.load_weights(tree_flatten(model.parameters()))
    yield "mlx_lm", step(theirs, lambda ids, cache: theirs(ids, cache=cache))
    yield "ours, without fused products", step(model, lambda ids, cache: model(ids, cache=cache))
    fuse(model)
    yield "ours", step(model, lambda ids, cache: model(ids, cache=cache))


def training_steps(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Yield name and node count of a LoRA step on two rows of 64 tokens: `mlx_lm`; ours as on a CPU; as on a GPU."""
    import mlx.core as mx

    from minicpm_data.training.options import LoraOptions
    from minicpm_mlx.model import initialize
    from minicpm_mlx.training import step as train
    from minicpm_mlx.training.trainer import Trainer

    ids = mx.random.randint(3, config.vocab_size, (2, 64))
    batch = {"ids": ids, "labels": ids, "segments": mx.ones_like(ids)}
    options = LoraOptions(rank=RANK, alpha=ALPHA, dropout=0.0, num_layers=-1, targets=TARGETS)
    yield "mlx_lm", peer_training(config, ids)
    for name, compiled in (("ours", lambda function: function), ("ours, compiled", mx.compile)):
        with mock.patch.object(train, "compiled", compiled):
            worker = Trainer(initialize(config, mx.random.key(0)), options)
        mx.eval(worker.weights, worker.optimizer.state)
        weights, figures = worker.train_step(worker.weights, [batch], 1e-5, mx.random.key(0))
        yield name, nodes(weights, worker.optimizer.state, figures)


def peer_training(config: ModelConfig, ids: Any) -> int:
    """Node count of the step that `mlx_lm.tuner.trainer` builds and compiles."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, optimizer = peer(config), optim.AdamW(1e-5)
    model.freeze()
    keys = [f"self_attn.{target}" for target in TARGETS]
    numbers = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, config.num_hidden_layers, numbers)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    mx.eval(state)

    @functools.partial(mx.compile, inputs=state, outputs=state)
    def step(batch, lengths):
        (loss, count), gradients = nn.value_and_grad(model, default_loss)(model, batch, lengths)
        optimizer.update(model, gradients)
        return loss, count

    return nodes(step(ids, mx.array([[0, 64]] * 2)), model.trainable_parameters(), optimizer.state)


def peer(config: ModelConfig) -> Any:
    """`mlx_lm`'s model for a config, with an untied head: with a tied head it does not divide the logits."""
    from mlx_lm.models import minicpm

    same = {key: getattr(config, key) for key in OF_THEIRS}
    return minicpm.Model(minicpm.ModelArgs(model_type="minicpm", tie_word_embeddings=False, **same))


def step(model: Any, call: Callable[[Any, list[Any]], Any]) -> tuple[Any, int]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    mx.eval(call(mx.array([[1, 7, 9, 4]]), cache), [layer.state for layer in cache])
    logits = call(mx.array([[5]]), cache)
    return logits, nodes(mx.argmax(logits[:, -1], axis=-1), [(layer.keys, layer.values) for layer in cache])


def nodes(*results: Any) -> int:
    """Number of nodes in the graph of arrays (or trees of arrays) that are not evaluated yet."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *(array for _, array in tree_flatten(results)))
        return len(re.findall("shape=rectangle", path.read_text()))


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.graph_nodes")
