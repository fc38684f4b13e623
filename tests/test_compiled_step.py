"""MLX's training step compiled, as it is on a Mac, beside the same one as it is on a CPU."""

import shutil

import numpy as np
import pytest
import tiny_training as tiny

from minicpm_data import load_tokenizer
from minicpm_data.datasets.batches import Batches
from minicpm_data.datasets.examples import load_split
from minicpm_data.training.options import PretrainOptions

mx = pytest.importorskip("mlx.core")

from benchmarks.graph_nodes import nodes  # noqa: E402
from minicpm_mlx.training import step as train  # noqa: E402
from minicpm_mlx.training.pretraining import Pretrainer  # noqa: E402

KINDS = {
    "lora": lambda root, out: tiny.lora(root, out),
    "dora on bits": lambda root, out: tiny.lora(root, out, fine_tune_type="dora", quantize=4, targets=("all-linear",)),
    "dpo": lambda root, out: tiny.lora(root, out, loss="dpo"),
    "all weights": lambda root, out: tiny.full(root, out, grad_checkpoint=True, optimizer="muon"),
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    root = tmp_path_factory.mktemp("worlds")
    return {name: tiny.write_world(root / name, **more) for name, more in {"dense": {}, "moe": tiny.MOE}.items()}


@pytest.fixture(scope="module")
def batches(worlds):
    """Of two rows, two for a step."""
    tokenizer = load_tokenizer(worlds["dense"] / "model")
    examples = load_split(worlds["dense"] / "data", "train", tokenizer, tiny.WIDTH).examples
    each = Batches(examples, 2, tiny.WIDTH, seed=0, accumulation=2)
    return [[each[2 * step + i].arrays() for i in (0, 1)] for step in range(4)]


@pytest.mark.parametrize("world", ["dense", "moe"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_step_has_fewer_nodes(worlds, batches, kind, world, tmp_path, monkeypatch):
    """Every kind of step can be traced; none is computed here."""

    def count():
        worker = tiny.trainer("minicpm_mlx", KINDS[kind](worlds[world], tmp_path / "out"))
        batch = {name: mx.array(array) for name, array in batches[0][0].items()} | {"reference": mx.zeros(2)}
        weights, figures = worker.train_step(worker.weights, [batch], 1e-2, mx.random.key(0))
        return nodes(weights, worker.optimiser.state, figures)

    plain = count()
    monkeypatch.setattr(train, "compiled", mx.compile)
    assert count() < 0.6 * plain


@pytest.mark.parametrize("world", ["dense", "moe"])
def test_the_compiled_step_of_pretraining_has_fewer_nodes(worlds, world, tmp_path, monkeypatch):
    root = worlds[world]
    options = PretrainOptions(
        tokenizer=root / "tokenizer",
        data=root,
        save_path=tmp_path / "out",
        init_from=str(root / "model"),
        grad_checkpoint=True,
    )
    windows = {"ids": mx.array(tiny.IDS)}

    def count():
        worker = Pretrainer(options, bos_token_id=1)
        weights, figures = worker.train_step(worker.weights, [windows], 1e-2, mx.random.key(0))
        return nodes(weights, worker.optimiser.state, figures)

    plain = count()
    monkeypatch.setattr(train, "compiled", mx.compile)
    assert count() < 0.6 * plain


@pytest.mark.slow  # a C++ compiler for each kernel, half a second for most
@pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU, MLX compiles with g++")
def test_compiled_or_not_a_run_is_the_same(worlds, batches, tmp_path, monkeypatch):
    """With dropout; the compiled run ends after two steps, and another one goes on from its checkpoint."""

    def worker():
        numbers = {"dropout": 0.1, "num_layers": 1, "targets": ("down_proj",)}  # for which the fewest kernels do
        return tiny.trainer("minicpm_mlx", tiny.lora(worlds["dense"], tmp_path / "out", **numbers))

    def run(worker, first, last):
        return [float(worker.step(batches[step], 1e-2, step)["loss"]) for step in range(first, last)]

    plain = worker()
    expected = run(plain, 0, 4)
    monkeypatch.setattr(train, "compiled", mx.compile)
    stopped = worker()
    losses = run(stopped, 0, 2)
    stopped.save(2)
    resumed = worker()
    losses += run(resumed, resumed.restore(), 4)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert min(np.abs(np.array(w)).max() for name, w in plain.weights.items() if name.endswith(".b")) > 0.01  # moved
    tiny.same(*({name: np.array(w) for name, w in each.weights.items()} for each in (resumed, plain)), 1e-4)
