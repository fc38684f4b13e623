"""What the tests of training share: a tiny model, data for it, and both backends behind the same few calls."""

import functools
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny_model

from minicpm_data.training import finetuning
from minicpm_data.training.options import FinetuneOptions, FullOptions, LoraOptions
from weights_io.adapters import Adapter, read_adapter
from weights_io.checkpoint import open_checkpoint
from weights_io.write import of_layers, unstack_params

BACKENDS = ("minicpm_jax", "minicpm_mlx")
DENSE = {"intermediate_size": 64}  # rows of 64, which have groups to be quantised in; two query heads share a key head
UNTIED = {**DENSE, "tie_word_embeddings": False}
MOE = {"intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LONGROPE = {  # of rows longer than 16 tokens the long factors
    "max_position_embeddings": 16,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
    },
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
MINICPM3 = {**DENSE, **LONGROPE, **LATENT, "architectures": ["MiniCPM3ForCausalLM"], "num_key_value_heads": 4}
MINICPM4 = {**UNTIED, **LONGROPE}
MINICPM5 = {
    **UNTIED,
    "model_type": "llama",
    "head_dim": 16,
    "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"},
}
WIDTH = 32  # of all rows, so that few programs are compiled
IDS = np.random.default_rng(0).integers(3, 300, (2, 24))
MEASURED = ("iterations_per_second", "tokens_per_second", "valid_seconds", "peak_memory")  # differ from run to run
WORDS = "fox dog sea story world hello lazy quick brown little".split()


@functools.cache
def part(backend: str, name: str) -> Any:
    return importlib.import_module(f"{backend}.{name}")


def load(backend: str, folder: Path, dtype: str | None = "float32", **options) -> Any:
    return part(backend, "loading").load(folder, dtype, **options)[0]


def logits(model: Any, ids: np.ndarray = IDS) -> np.ndarray:
    return np.asarray(model(ids))


def chats(count: int, seed: int = 0) -> list[dict]:
    """Conversations whose answers have from one to six words."""
    random = np.random.default_rng(seed)
    words = [" ".join(random.choice(WORDS, size)) for size in random.integers(1, 7, 2 * count)]
    return [{"prompt": words[2 * i][:12], "completion": words[2 * i + 1][:24]} for i in range(count)]


def preferences(count: int) -> list[dict]:
    """Answers in English are chosen, in Chinese rejected."""
    return [{"prompt": chat["prompt"], "chosen": chat["completion"], "rejected": "海在"} for chat in chats(count)]


def write_data(folder: Path, train: Sequence[dict], **splits: Sequence[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"train": train, **splits}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder


def write_world(root: Path, **changes) -> Path:
    """``root`` with a ``model`` and ``data``; ``changes`` are keys of the model's config."""
    tiny_model.write(root, **{**DENSE, **changes})
    write_data(root / "data", chats(24), valid=chats(6, seed=1), test=chats(5, seed=2))
    return root


def lora(root: Path, out: Path, **changes) -> LoraOptions:
    return _options(LoraOptions, root, adapter_path=out, **changes)


def full(root: Path, out: Path, **changes) -> FullOptions:
    return _options(FullOptions, root, save_path=out, **changes)


def _options(kind: type, root: Path, **changes) -> Any:
    short = {"batch_size": 2, "max_seq_length": WIDTH, "iters": 4, "warmup_steps": 0, "learning_rate": 1e-2}
    common = {"model": str(root / "model"), "data": root / "data", "dtype": "float32", **short}
    return kind(**{**common, **changes})


def flags(options: FinetuneOptions) -> list[str]:
    """As they are typed."""
    default = type(options)()
    given = {name: value for name, value in vars(options).items() if value != getattr(default, name)}
    words = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    return [word for name, value in words.items() for word in ([name] if value is True else [name, str(value)])]


def finetune(backend: str, options: FinetuneOptions) -> None:
    finetuning.finetune(options, part(backend, "backend").backend, part(backend, "backend").trainer)


def trainer(backend: str, options: FinetuneOptions) -> Any:
    source = open_checkpoint(Path(options.model))
    model = load(backend, source, options.dtype, **options.loading())
    return part(backend, "training.trainer").Trainer(model, options, source)


def model_of(worker: Any) -> Any:
    """The model as it is trained, without dropout."""
    return worker.trained.model(worker.base, worker.state[0]) if hasattr(worker, "state") else worker.model


def exported(worker: Any) -> Adapter:
    worker.export()
    return read_adapter(worker.options.out, worker.config)


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def gradients(backend: str, model: Any, batch: dict[str, np.ndarray], **objective) -> tuple[dict, dict]:
    """The objective's sums, and its gradient by Hugging Face tensor name."""
    objective = part(backend, "training.losses").Objective(**objective)
    if backend == "minicpm_jax":
        import jax

        from minicpm_jax.training import step as train

        whole = train.FullFinetune(model.config, "float32")

        def total(weights):
            return objective(whole.model(None, weights), batch)

        (_, sums), found = jax.jit(jax.value_and_grad(total, has_aux=True))(train.weights_of(model))
        tensors = unstack_params(model.config, found)
    else:
        import mlx.core as mx
        import mlx.nn as nn
        from mlx.utils import tree_flatten

        arrays = {name: mx.array(array) for name, array in batch.items()}
        (_, sums), found = nn.value_and_grad(model, lambda batch: objective(model, batch))(arrays)
        tensors = of_layers(model.config, {name: np.array(array) for name, array in tree_flatten(found)})
    return {name: float(value) for name, value in sums.items()}, {n: t.read() for n, t in tensors.items()}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Arrays by name; the tolerance is in shares of the largest number of each."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        size = max(float(np.abs(wanted).max()), 1e-3)
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=tolerance * size, err_msg=name)


def same_adapters(found: Adapter, expected: Adapter, tolerance: float) -> None:
    def arrays(adapter: Adapter) -> dict[str, np.ndarray]:
        parts = ("a", "b", "magnitude") if adapter.config.dora else ("a", "b")
        return {f"{name} {part}": getattr(m, part) for name, m in adapter.tensors.items() for part in parts}

    assert found.config.scale == expected.config.scale and found.config.dora == expected.config.dora
    same(arrays(found), arrays(expected), tolerance)


def arrays_of(worker: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A trainer's arrays by name: what it trains with their moments, and what it must leave as it is."""
    if hasattr(worker, "weights"):
        from mlx.utils import tree_flatten

        base = dict(tree_flatten(worker.model.parameters()))
        trained = dict(tree_flatten([worker.weights, worker.optimizer.state]))
        return trained, {name: array for name, array in base.items() if name not in worker.weights}
    import jax

    trees = map(jax.tree_util.tree_leaves_with_path, (worker.state, worker.base))
    trained, base = ({jax.tree_util.keystr(path): leaf for path, leaf in tree} for tree in trees)
    return trained, base


def dtypes(arrays: dict[str, Any]) -> set[str]:
    """Of the arrays of numbers with fractions, without the library's name."""
    found = {str(array.dtype).removeprefix("mlx.core.") for array in arrays.values()}
    return {name for name in found if "float" in name}
