"""The training loop round both backends: runs that are stopped, preferences, all weights, and what cannot be."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_adapter
import tiny_training as tiny
from tiny_training import BACKENDS, part

from minicpm_data import load_tokenizer
from minicpm_data.datasets.batches import Batches
from minicpm_data.datasets.examples import load_split
from minicpm_data.metrics import read_records
from minicpm_data.training import finetuning
from minicpm_data.training.options import LoraOptions
from weights_io.adapters import read_adapter, save_adapter
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError

pytest.importorskip("jax")
pytest.importorskip("mlx.core")

pytestmark = pytest.mark.slow  # minutes on two cores: run with the whole suite alone

STEPS = 14
LONG = {"iters": STEPS, "save_every": 3, "steps_per_eval": 5, "learning_rate": 0.05}  # with dropout, as by default


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """``model``, ``data``, and an ``adapter`` of the last layer."""
    root = tiny.write_world(tmp_path_factory.mktemp("world"))
    checkpoint = open_checkpoint(root / "model")
    save_adapter(root / "adapter", tiny_adapter.make(checkpoint, ["q_proj", "v_proj"], [1]), checkpoint.config)
    return root


@pytest.fixture(scope="module")
def whole(backend, world, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    tiny.finetune(backend, tiny.lora(world, out, **LONG))
    return out


def figures(out):
    return [{name: n for name, n in record.items() if name not in tiny.MEASURED} for record in tiny.records(out)]


def adapter_bytes(out):
    return (out / "adapter_model.safetensors").read_bytes()


def test_a_run_learns_and_says_so(whole, world):
    records = tiny.records(whole)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert [record["step"] for record in records if "valid_loss" in record] == [1, 5, 10, STEPS]
    assert records[-1]["epoch"] == pytest.approx(STEPS * 2 / 24)
    assert (whole / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert read_adapter(whole, open_checkpoint(world / "model").config).config.dropout == 0.1


def test_a_run_killed_at_random_moments_is_the_run_that_was_not(backend, world, whole, tmp_path):
    """Twice, the first time between two of its checkpoints or in one; between the kills the figures are whole."""
    options, out = {**LONG, "save_every": 2}, tmp_path / "out"
    chance, resumed = random.Random(7), 0
    for kill in range(2):
        given = tiny.lora(world, out, **options, resume=kill > 0)
        command = [sys.executable, "-m", f"{backend}.lora", *tiny.flags(given)]
        with (tmp_path / "said").open("w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
            deadline, before = time.monotonic() + 120, resumed
            while process.poll() is None and last_step(out) <= before:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.1) if kill else 0)
            process.kill()
            process.wait(60)
        assert process.returncode in (-signal.SIGKILL, 0), (tmp_path / "said").read_text()
        assert kill or process.returncode, "it ended before it was killed"
        resumed = last_step(out)
        steps = [record["step"] for record in read_records(out / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= resumed
    tiny.finetune(backend, tiny.lora(world, out, **options, resume=True))
    assert figures(out) == figures(whole)
    assert adapter_bytes(out) == adapter_bytes(whole)
    assert not [path for path in out.rglob("*") if "partial" in path.name or "tmp" in path.name]


def last_step(out):
    return max((int(path.name) for path in out.glob("checkpoints/*") if path.name.isdecimal()), default=0)


def command_line(monkeypatch, backend, *arguments):
    """Exit code of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["lora", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        finetuning.run(part(backend, "backend").backend, part(backend, "backend").trainer, LoraOptions, "lora")
    return end.value.code


def test_a_second_run_in_the_same_folder_is_refused(world, tmp_path, monkeypatch, capsys):
    """By the command, while the first one runs; the first goes on."""
    options = tiny.flags(tiny.lora(world, out := tmp_path / "out", **{**LONG, "iters": 2000}))
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-m", "minicpm_mlx.lora", *options], **pipes) as first:
        try:
            deadline = time.monotonic() + 120
            while not last_step(out) and first.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert command_line(monkeypatch, "minicpm_mlx", *options, "--resume") == 2
            said = capsys.readouterr().err
            assert f"in use by another run (process {first.pid} on" in said
            assert said.count("error:") == 1 and first.poll() is None
        finally:
            first.kill()


def test_ctrl_c_waits_for_the_step_and_says_how_to_go_on(backend, world, whole, tmp_path, monkeypatch, capsys):
    options = tiny.lora(world, tmp_path / "out", **LONG)
    trainer, step = part(backend, "training.trainer").Trainer, part(backend, "training.trainer").Trainer.step

    def interrupted(self, batches, rate, number):
        if number == 7:
            signal.raise_signal(signal.SIGINT)
        return step(self, batches, rate, number)

    monkeypatch.setattr(trainer, "step", interrupted)
    assert command_line(monkeypatch, backend, *tiny.flags(options)) == 130
    assert "stopped after step 8 of 14; the same command with --resume goes on" in capsys.readouterr().out
    assert len(tiny.records(tmp_path / "out")) == 8
    monkeypatch.setattr(trainer, "step", step)
    tiny.finetune(backend, tiny.lora(world, tmp_path / "out", **LONG, resume=True))
    assert "resuming after step 8" in capsys.readouterr().out
    assert figures(tmp_path / "out") == figures(whole)
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(whole)


# orbax leaves an event loop behind when it fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_what_was_saved(backend, world, whole, tmp_path, monkeypatch, capsys):
    options = tiny.lora(world, tmp_path / "out", **LONG)
    trainer = part(backend, "training.trainer").Trainer
    save, export = trainer.save, trainer.export

    def on_a_full_disk(method):
        """No file grows beyond 4 kB."""

        def run(self, *arguments):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
            try:
                method(self, *arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        return run

    monkeypatch.setattr(trainer, "save", lambda self, n: (save if n < 9 else on_a_full_disk(save))(self, n))
    assert command_line(monkeypatch, backend, *tiny.flags(options)) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "Traceback" not in said
    assert "checkpoint of step 9 cannot be written" in said and "of step 6, is whole: make room, and --resume" in said
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["3", "6"]
    before = adapter_bytes(tmp_path / "out")
    monkeypatch.setattr(trainer, "save", save)
    monkeypatch.setattr(trainer, "export", on_a_full_disk(export))
    assert command_line(monkeypatch, backend, *tiny.flags(options), "--resume") == 2
    assert "File too large" in capsys.readouterr().err
    assert adapter_bytes(tmp_path / "out") == before
    monkeypatch.setattr(trainer, "export", export)
    tiny.finetune(backend, tiny.lora(world, tmp_path / "out", **LONG, resume=True))
    assert figures(tmp_path / "out") == figures(whole)
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(whole)


def test_a_finished_run_has_its_export(backend, world, whole, tmp_path):
    """Also where it was killed between its last checkpoint and the export."""
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    tiny.finetune(backend, tiny.lora(world, tmp_path / "out", **LONG, resume=True))
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(whole)


def test_the_loss_on_the_test_examples(backend, world, whole, tmp_path, capsys):
    tiny.finetune(backend, tiny.lora(world, whole, test=True, iters=None))
    trained = float(capsys.readouterr().out.split("Test loss ")[1].split(",")[0])
    with pytest.raises(InputError, match="is no adapter: give the folder"):
        tiny.finetune(backend, tiny.lora(world, tmp_path / "none", test=True, iters=None))
    assert not (tmp_path / "none").exists()
    assert trained < tiny.records(whole)[0]["loss"] - 0.5


@pytest.fixture(scope="module")
def all_weights(world, tmp_path_factory):
    """Folders of the same run of all weights in each backend, in float32."""
    outs = {backend: tmp_path_factory.mktemp("full") / backend for backend in BACKENDS}
    for backend, out in outs.items():
        tiny.finetune(backend, tiny.full(world, out, iters=5, learning_rate=3e-3))
    return outs


def test_all_weights_in_both_backends(world, all_weights):
    records = [tiny.records(out) for out in all_weights.values()]
    for name in ("loss", "valid_loss", "gradient_norm"):
        values = [[record[name] for record in of if name in record] for of in records]
        np.testing.assert_allclose(*values, rtol=1e-4)
    assert records[0][-1]["loss"] < records[0][0]["loss"] - 0.2
    tensors = [open_checkpoint(out / "model").tensors for out in all_weights.values()]
    one, other = ({name: tensor.read() for name, tensor in of.items()} for of in tensors)
    tiny.same(one, other, 1e-3)  # where a gradient is almost nothing, Adam's first steps have the sign of its rounding
    expected = tiny.logits(tiny.load(BACKENDS[0], all_weights[BACKENDS[0]] / "model"))
    for backend in BACKENDS:
        for out in all_weights.values():
            np.testing.assert_allclose(tiny.logits(tiny.load(backend, out / "model")), expected, atol=1e-4)
    assert np.abs(expected - tiny.logits(tiny.load(BACKENDS[0], world / "model"))).max() > 0.05


def test_a_checkpoint_of_all_weights_becomes_a_model(world, all_weights, tmp_path, monkeypatch):
    """The last is what the run exported; of adapters, and of MLX, there is nothing to make."""
    from minicpm_jax.export import Options, main

    main(Options(all_weights["minicpm_jax"], tmp_path / "model"))
    for path in (tmp_path / "model").iterdir():
        assert (all_weights["minicpm_jax"] / "model" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(InputError, match="is a run of MLX"):
        main(Options(all_weights["minicpm_mlx"], tmp_path / "none"))
    other = tiny.write_world(tmp_path / "other", hidden_size=64)
    with pytest.raises(InputError, match=r"checkpoints/5 is of another model: its .* is \(.*\), and the model's \("):
        main(Options(all_weights["minicpm_jax"], tmp_path / "none", source=str(other / "model")))
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def batch(world):
    tokenizer = load_tokenizer(world / "model")
    examples = load_split(world / "data", "train", tokenizer, tiny.WIDTH).examples
    return Batches(examples, 2, tiny.WIDTH, seed=0)[0].arrays()


def test_recomputing_layers_changes_nothing(backend, world, batch, tmp_path):
    found = []
    for again in (False, True):
        worker = tiny.trainer(backend, tiny.full(world, tmp_path / "out", grad_checkpoint=again))
        steps = [worker.step([batch], 1e-3, step) for step in range(3)]
        found.append([float(figures[name]) for figures in steps for name in ("loss", "gradient_norm")])
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_masters_are_in_float32(backend, world, batch, tmp_path):
    """Steps that bfloat16 would round away add up."""
    worker = tiny.trainer(backend, tiny.full(world, tmp_path / "out", dtype="bfloat16"))
    for step in range(2):
        worker.step([batch], 1e-6, step)
    worker.save(2)
    assert tiny.dtypes(tiny.arrays_of(worker)[0]) == {"float32"}
    assert "bfloat16" in str(tiny.model_of(worker).model.norm.weight.dtype)
    worker.export()
    before, after = (open_checkpoint(path / "model") for path in (world, tmp_path / "out"))
    moved = after.read("model.norm.weight", "float32") - before.read("model.norm.weight", "float32")
    assert 0 < np.abs(moved).max() < 4e-6  # bfloat16 has nothing between 1 and 1.0078


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return tiny.write_data(
        tmp_path_factory.mktemp("pairs"), tiny.preferences(7), valid=tiny.preferences(3), test=tiny.preferences(4)
    )


@pytest.fixture(scope="module", params=["dpo", "orpo"])
def preferred(request, world, pairs, tmp_path_factory):
    """Kind of loss, and the folder of each backend's run from the same adapter, which is then the reference."""
    folder, checkpoint = tmp_path_factory.mktemp(request.param), open_checkpoint(world / "model")
    start = tiny_adapter.make(checkpoint, ["q_proj", "v_proj"], ranks=(8,))
    save_adapter(folder / "start", start, checkpoint.config)
    numbers = {"alpha": 16.0, "dropout": 0.0, "resume_adapter_file": folder / "start", "learning_rate": 0.03}
    for backend in BACKENDS:
        choice = {"data": pairs, "loss": request.param, "beta": 0.5}
        tiny.finetune(backend, tiny.lora(world, folder / backend, iters=16, steps_per_eval=8, **choice, **numbers))
    return request.param, {backend: folder / backend for backend in BACKENDS}


def test_preferences(preferred):
    """Seven pairs in batches of two, and three to validate with: the last batch is filled up with an empty row."""
    kind, outs = preferred
    records = {backend: tiny.records(out) for backend, out in outs.items()}
    for name in ("loss", "margin", "valid_loss"):
        values = [[record[name] for record in of if name in record] for of in records.values()]
        np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-4)
    first, *_, last = records[BACKENDS[0]]
    if kind == "dpo":
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-5)
    assert last["margin"] > first["margin"] + 0.3 and last["accuracy"] == 1 > first["accuracy"]
    assert last["valid_loss"] < first["valid_loss"]


def test_a_preference_on_the_test_examples(preferred, world, pairs, capsys):
    """With what was trained before: the reference is the model without it, though the adapter is on the model."""
    kind, outs = preferred
    losses = []
    for backend in BACKENDS:
        options = tiny.lora(world, outs[BACKENDS[0]], data=pairs, loss=kind, beta=0.5, test=True, iters=None)
        tiny.finetune(backend, options)
        losses.append(float(capsys.readouterr().out.split("Test loss ")[1].split(",")[0]))
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert kind != "dpo" or losses[0] < 0.65


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 0}, "the adapter's rank is 0"),
        ({"targets": ("qq_proj",)}, "has no matrix 'qq_proj' that an adapter can change; choose among q_proj"),
        ({"num_layers": 3}, "num_layers is 3; the model has 2 layers"),
        ({"batch_size": 25}, "24 examples do not fill one batch of 25; give --batch-size 24"),
        ({"warmup_steps": 9}, "warmup_steps 9 is more than the 4 steps"),
        ({"data": "nowhere"}, "data nowhere does not exist"),
        ({"data": "{world}/model"}, "holds no train.jsonl or train.json"),
        ({"loss": "dpo"}, "train.jsonl, line 1: it has the keys prompt and completion"),
        ({"data": "{pairs}"}, "these are preference pairs"),
        ({"adapter_path": "{world}/model"}, "is not empty and holds no run"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"loss": "dpo", "pack": True}, "pack is for loss sft"),
        ({"epochs": 2.0}, "iters and epochs both"),
        ({"resume_adapter_file": "{world}/none"}, "is no adapter"),
        ({"resume_adapter_file": "{world}/adapter"}, "has rank 4, and the options say 8; give the options that it"),
        (
            {"resume_adapter_file": "{world}/adapter", "rank": 4, "alpha": 8.0},
            "is not on model.layers.0.self_attn.q_proj, and the options say otherwise",
        ),
    ],
)
def test_what_cannot_be(backend, world, pairs, tmp_path, changes, said):
    """One sentence, and nothing is written."""
    filled = {n: v.format(world=world, pairs=pairs) if isinstance(v, str) else v for n, v in changes.items()}
    for name in filled.keys() & {"data", "adapter_path"}:
        filled[name] = tiny.Path(filled[name])
    out = filled.pop("adapter_path", tmp_path / "out")
    before = sorted(out.iterdir()) if out.exists() else None
    with pytest.raises(InputError) as error:
        tiny.finetune(backend, tiny.lora(world, out, **filled))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert (sorted(out.iterdir()) if out.exists() else None) == before


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "train.jsonl is empty; give it one example a line"),
        ('{"text": "Hello"}\n{"text": "Hel', "train.jsonl, line 2 is not JSON"),
        ('{"words": 1}\n', "train.jsonl, line 1: it has the keys words"),
        ('{"messages": [{"role": "user", "content": "Hello"}]}\n', "train.jsonl"),
        (json.dumps({"prompt": "fox " * 40, "completion": "dog"}), "has anything to train in its first 32 tokens"),
    ],
)
def test_data_that_cannot_be(world, tmp_path, lines, said):
    (tmp_path / "train.jsonl").write_text(lines)
    with pytest.raises(InputError) as error:
        tiny.finetune(BACKENDS[0], tiny.lora(world, tmp_path / "out", data=tmp_path / "train.jsonl", batch_size=1))
    assert said in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_another_run_is_not_gone_on_with(backend, world, whole):
    before = figures(whole), adapter_bytes(whole)
    with pytest.raises(InputError, match="holds a run; add --resume to continue it"):
        tiny.finetune(backend, tiny.lora(world, whole, **LONG))
    with pytest.raises(InputError, match="holds a run with another rank; choose another"):
        tiny.finetune(backend, tiny.lora(world, whole, **LONG, rank=4, resume=True))
    assert (figures(whole), adapter_bytes(whole)) == before


def test_a_run_that_breaks_down_keeps_what_was_saved(backend, world, tmp_path):
    """And one that does before anything is saved does not stand in the way of the next try."""
    out = tmp_path / "out"
    wild = {"learning_rate": 1e30, "lr_schedule": "constant"}
    for save_every, kept in ((4, []), (1, ["1"])):
        with pytest.raises(InputError, match=r"loss of step 2 is nan \(its first example begins with ids 1 \d+ "):
            tiny.finetune(backend, tiny.lora(world, out, save_every=save_every, **wild))
        assert sorted(path.name for path in out.glob("checkpoints/*")) == kept
        assert (out / "adapter_model.safetensors").exists() == bool(kept)
    adapter = read_adapter(out, open_checkpoint(world / "model").config)
    assert all(np.isfinite(m.b).all() for m in adapter.tensors.values())


def test_a_damaged_checkpoint_is_told(backend, tmp_path):
    """And the one before it is there to go on from."""
    ones = part(backend, "model").jnp.ones if backend == "minicpm_jax" else part(backend, "model").mx.ones
    state = {"weights": {"a": ones((64, 64))}}
    checkpoints = part(backend, "training.run_checkpoints").Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state)
    for path in (tmp_path / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"step 2 cannot be read .*; delete .*2 and --resume goes on from step 1\."):
        part(backend, "training.run_checkpoints").Checkpoints(tmp_path).restore(state)
    shutil.rmtree(tmp_path / "2")
    restored = part(backend, "training.run_checkpoints").Checkpoints(tmp_path).restore(state)
    np.testing.assert_array_equal(np.array(restored["weights"]["a"]), np.ones((64, 64)))
