"""Nodes in the graph of a decode step: ours in MLX, layers apart and joined, and the minicpm of `mlx_lm`.

    python -m benchmarks.graph_nodes --layers 40

One node is at least one kernel to be launched. Counted in the graph that MLX exports for this device: on a CPU the
norms, the rotation and attention are many nodes each, on a GPU one.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import random_model, wide
from weights_io import command_line
from weights_io.config import ModelConfig

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
    """With a narrow model: the graph is the same at any width."""


def main(options: Options) -> None:
    """Count, and print a table."""
    narrow = {"hidden_size": 96, "intermediate_size": 240, "tie_word_embeddings": False}
    _, model = random_model("mlx", wide(options.layers, 256, **narrow), join=False)
    print("| decode step of | nodes | of mlx_lm's | a layer |\n|---|---|---|---|")
    counts = dict(steps(model))
    for name, (_, nodes) in counts.items():
        share = nodes / counts["mlx_lm"][1]
        print(f"| {name} | {nodes:,} | {share:.2f} | {nodes / options.layers:.1f} |")


def steps(model: Any) -> Iterator[tuple[str, tuple[Any, int]]]:
    """Logits of a step after four tokens, and the nodes of its graph: of `mlx_lm` with the weights of ``model``, of the
    model as it is, and joined, which it then stays."""
    from mlx.utils import tree_flatten

    from minicpm_mlx.joined import join

    theirs = peer(model.config)
    theirs.load_weights(tree_flatten(model.parameters()))
    yield "mlx_lm", step(theirs, lambda ids, cache: theirs(ids, cache=cache))
    yield "ours, layers apart", step(model, lambda ids, cache: model(ids, cache=cache))
    join(model)
    yield "ours", step(model, lambda ids, cache: model(ids, cache=cache))


def peer(config: ModelConfig) -> Any:
    """`mlx_lm`'s model of a config without a tied head, which it does not divide."""
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
    """In the graph of arrays, or trees of them, that are not yet computed."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *(array for _, array in tree_flatten(results)))
        return len(re.findall("shape=rectangle", path.read_text()))


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.graph_nodes")
