"""LoRA, DoRA and QLoRA in both backends: where they begin, their steps, and what is saved of them."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tiny_adapter
import tiny_training as tiny
from tiny_training import BACKENDS, MINICPM3, MINICPM4, MINICPM5, MOE

from minicpm_data import load_tokenizer
from minicpm_data.datasets.batches import Batches
from minicpm_data.datasets.examples import load_split
from minicpm_data.training.trainable import adapter_parameters, share
from weights_io.adapters import save_adapter
from weights_io.checkpoint import open_checkpoint

pytest.importorskip("jax")
pytest.importorskip("mlx.core")

ALL = {"targets": ("all-linear",)}
DORA = {"fine_tune_type": "dora"}
WORLDS = {"dense": {}, "moe": MOE, "minicpm3": MINICPM3, "minicpm4": MINICPM4, "minicpm5": MINICPM5}
KINDS = {
    "minicpm4, lora": {},
    "minicpm3, all-linear": ALL,
    "minicpm5, dora, last layer": DORA | {"num_layers": 1},
    "moe, dora": DORA | ALL,
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    return {name: tiny.write_world(root / name, **changes) for name, changes in WORLDS.items()}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


def batches_of(root, count, **options):
    tokenizer = load_tokenizer(root / "model")
    examples = load_split(root / "data", "train", tokenizer, tiny.WIDTH).examples
    batches = Batches(examples, options.pop("batch_size", 2), tiny.WIDTH, seed=0, **options)
    return [batches[n].arrays() for n in range(count)]


@pytest.fixture(scope="module")
def trained(worlds, kind, tmp_path_factory):
    """After three steps in each backend from the same random adapter: trainers and their losses."""
    root, out = worlds[kind.partition(",")[0]], tmp_path_factory.mktemp("trained")
    flags = KINDS[kind]
    checkpoint = open_checkpoint(root / "model")
    layers = [1] if flags.get("num_layers") == 1 else None
    targets = flags.get("targets", ("q_proj", "v_proj"))
    start = tiny_adapter.make(checkpoint, targets, layers, dora="dora" in kind)
    save_adapter(out / "start", start, checkpoint.config)
    numbers = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "resume_adapter_file": out / "start"}
    workers, losses = {}, {}
    for backend in BACKENDS:
        worker = tiny.trainer(backend, tiny.lora(root, out / backend, **flags, **numbers))
        figures = [worker.step([batch], 1e-2, step) for step, batch in enumerate(batches_of(root, 3))]
        losses[backend] = [float(f["loss"]) for f in figures]
        workers[backend] = worker
    return root, start, workers, losses


def test_both_backends_take_the_same_steps(trained):
    _, start, workers, losses = trained
    np.testing.assert_allclose(*losses.values(), rtol=1e-5)
    adapters = [tiny.exported(worker) for worker in workers.values()]
    tiny.same_adapters(*adapters, 2e-4)
    assert adapters[0].tensors.keys() == start.tensors.keys()
    moved = [np.abs(m.b - start.tensors[name].b).max() for name, m in adapters[0].tensors.items()]
    assert min(moved) > 1e-3


def test_what_is_saved_gives_the_trainers_logits(trained):
    root, _, workers, _ = trained
    for worker in workers.values():
        worker.export()
        expected = tiny.logits(tiny.model_of(worker))
        for backend in BACKENDS:
            loaded = tiny.load(backend, root / "model", adapter=worker.options.out)
            np.testing.assert_allclose(tiny.logits(loaded), expected, atol=1e-4)
        plain = tiny.logits(tiny.load(BACKENDS[0], root / "model"))
        assert np.abs(plain - expected).max() > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_begins_as_the_base(worlds, kind, tmp_path, backend):
    root = worlds[kind.partition(",")[0]]
    worker = tiny.trainer(backend, tiny.lora(root, tmp_path / "out", **KINDS[kind]))
    tolerance = 1e-5 if "dora" in kind else 0  # its ratio of two norms is 1 but for rounding
    base = tiny.logits(tiny.load(backend, root / "model"))
    np.testing.assert_allclose(tiny.logits(tiny.model_of(worker)), base, rtol=0, atol=tolerance)
    names = tiny.exported(worker).tensors
    assert not any("gate" in name.split(".") for name in names)  # the router
    assert any("experts.3.w2" in name for name in names) == ("moe" in kind)
    assert any("layers.0" in name for name in names) == ("last" not in kind)


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_make_one_batch(worlds, tmp_path, backend):
    """Two of 2 rows and one of 4, with the same examples; every trained token weighs the same."""
    root, (batch,) = worlds["dense"], batches_of(worlds["dense"], 1, batch_size=4)
    parts = [{name: array[rows] for name, array in batch.items()} for rows in (slice(2), slice(2, 4))]
    assert len({int((half["labels"] > 0).sum()) for half in parts}) == 2
    start = tiny_adapter.make(open_checkpoint(root / "model"), ["q_proj", "v_proj"])
    save_adapter(tmp_path / "start", start, open_checkpoint(root / "model").config)
    numbers = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "optimizer": "sgd", "clip": 1e9}
    found = []
    for name, group in (("one", [batch]), ("two", parts)):
        options = tiny.lora(root, tmp_path / name, resume_adapter_file=tmp_path / "start", **numbers)
        worker = tiny.trainer(backend, options)
        figures = {key: float(value) for key, value in worker.step(group, 0.1, 0).items()}
        found.append((figures, tiny.exported(worker)))
    (one, adapter), (two, other) = found
    assert two == pytest.approx(one, rel=1e-5)
    tiny.same_adapters(other, adapter, 1e-5)
    assert max(np.abs(m.b - start.tensors[name].b).max() for name, m in adapter.tensors.items()) > 5e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_are_in_float32_on_a_base_in_bfloat16(worlds, tmp_path, backend):
    root = worlds["dense"]
    worker = tiny.trainer(backend, tiny.lora(root, tmp_path / "out", dtype="bfloat16"))
    worker.step(batches_of(root, 1), 1e-3, 0)
    trained, base = map(tiny.dtypes, tiny.arrays_of(worker))
    assert (trained, base) == ({"float32"}, {"bfloat16"})
    changes = [np.abs(m.b).max() for m in tiny.exported(worker).tensors.values()]
    assert min(changes) == pytest.approx(1e-3, rel=0.01)  # Adam's first step, which bfloat16 rounds to 0.0009995


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quantised_base(worlds, tmp_path, backend, bits):
    """Its logits are near the base's, it stays as it is, and what was trained on it fits the base itself."""
    root, batches = worlds["dense"], batches_of(worlds["dense"], 2)
    base = tiny.logits(tiny.load(backend, root / "model"))
    worker = tiny.trainer(backend, tiny.lora(root, tmp_path / "out", quantize=bits, **DORA))
    before = tiny.logits(tiny.model_of(worker))
    error = np.sqrt(np.mean((before - base) ** 2) / np.mean(base**2))
    assert (1e-4 if bits == 8 else 2e-3) < error < (2e-3 if bits == 8 else 0.03)
    kept = {name: np.array(array) for name, array in tiny.arrays_of(worker)[1].items()}
    losses = [float(worker.step(batches[:1], 1e-2, step)["loss"]) for step in range(4)]
    assert losses[-1] < losses[0]
    for name, array in tiny.arrays_of(worker)[1].items():
        np.testing.assert_array_equal(array, kept[name], err_msg=name)
    moved = tiny.logits(tiny.model_of(worker)) - before
    worker.export()
    on_the_base = tiny.logits(tiny.load(backend, root / "model", adapter=tmp_path / "out")) - base
    assert np.sqrt(np.mean((on_the_base - moved) ** 2)) < 0.3 * np.sqrt(np.mean(moved**2))


def test_the_share_that_is_trained(worlds, kind, tmp_path):
    """As many numbers as an adapter of these options has."""
    root, flags = worlds[kind.partition(",")[0]], KINDS[kind]
    options, checkpoint = tiny.lora(root, tmp_path, rank=4, **flags), open_checkpoint(root / "model")
    targets, layers = flags.get("targets", ("q_proj", "v_proj")), [1] if "last" in kind else None
    made = tiny_adapter.make(checkpoint, targets, layers, dora="dora" in kind)
    sizes = [0 if x is None else x.size for m in made.tensors.values() for x in (m.a, m.b, m.magnitude)]
    count, whole = (
        sum(sizes),
        sum(np.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
    )
    assert adapter_parameters(options, checkpoint.config) == count
    said = f"Trainable parameters: {count / (count + whole):.3%} ({count / 1e6:.3f}M/{(count + whole) / 1e6:.3f}M)"
    assert share(options, checkpoint.config) == said
    assert share(tiny.full(root, tmp_path), checkpoint.config).startswith("Trainable parameters: 100.000% (")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_reports_as_mlx_lm_does(worlds, tmp_path, capsys, backend):
    options = tiny.lora(worlds["dense"], tmp_path / "out", iters=3, val_batches=1)
    tiny.finetune(backend, options)
    said = capsys.readouterr().out
    assert re.search(r"^Trainable parameters: \d+\.\d{3}% \(\d+\.\d{3}M/\d+\.\d{3}M\)$", said, re.M)
    assert len(re.findall(r"^Iter [13]: Val loss \d+\.\d{3}, Val took \d+\.\d{3}s$", said, re.M)) == 2
    figures = r"Learning Rate \S+e-\d\d, It/sec [\d.]+, Tokens/sec [\d,]+, Trained Tokens (\d+), Peak mem \d+\.\d{3} GB"
    (one, first), (mean, last) = re.findall(rf"^Iter [13]: Train loss (\d+\.\d{{3}}), {figures}$", said, re.M)
    records = tiny.records(tmp_path / "out")
    counts = [record["trained_tokens"] for record in records]
    assert 0 < counts[0] < counts[1] < counts[2] and [counts[0], counts[2]] == [int(first), int(last)]
    losses = [record["loss"] for record in records]
    assert (float(one), float(mean)) == pytest.approx((losses[0], (losses[1] + losses[2]) / 2), abs=6e-4)
    assert {*tiny.MEASURED} <= records[-1].keys()
    if backend == "minicpm_mlx":  # its run is not compiled again
        tiny.finetune(backend, replace(options, iters=4, resume=True, val_batches=0))
        said = capsys.readouterr().out
        assert "Val loss" not in said and "valid.jsonl" not in said
        assert tiny.records(tmp_path / "out")[-1]["trained_tokens"] > counts[2]
