"""Pretraining: the schedule, the windows, muP's groups, and a run that is killed and goes on as if it had not been."""

import importlib.machinery
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import several_processes
import tiny_tokenizer
import tiny_training as tiny
from documented_commands import typed

from minicpm_jax.training import optimizers

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

from minicpm_data import load_tokenizer
from minicpm_data.datasets.pretraining import WindowBatches, pack
from minicpm_data.metrics import Metrics, check_reporter
from minicpm_data.schedules import WarmupStableDecay
from minicpm_jax.export import Options, main
from minicpm_jax.model import initialize
from minicpm_jax.training import step as train
from minicpm_jax.training.losses import packed_loss
from weights_io import command_line
from weights_io.checkpoint import open_checkpoint
from weights_io.config import ModelConfig
from weights_io.errors import InputError

RAW = {
    "architectures": ["MiniCPMForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STEPS = ["--iters", "24", "--warmup-steps", "3", "--decay-steps", "8", "--half-life", "3", "--save-every", "4"]
SIZES = ["--batch-size", "2", "--max-seq-length", "32", "--steps-per-eval", "8"]


def test_the_schedule_has_three_stages():
    schedule = WarmupStableDecay(peak=0.01, steps=100, warmup_steps=10, decay_steps=20, half_life=5)
    assert schedule.decay_start == 80
    assert [schedule(s) for s in (0, 4, 9, 10, 79)] == pytest.approx([0.001, 0.005, 0.01, 0.01, 0.01])
    assert schedule(84) == pytest.approx(0.005) and schedule(99) == pytest.approx(0.01 / 16)
    for decay, halfway in [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - math.sqrt(0.5))]:
        form = WarmupStableDecay(1.0, 100, 10, 20, decay)
        assert form(89) == pytest.approx(halfway) and form(99) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("wrong", [{"decay_steps": 95}, {"warmup_steps": -1}, {"half_life": 0}])
def test_schedules_that_cannot_be(wrong):
    with pytest.raises(InputError):
        WarmupStableDecay(**{"peak": 1.0, "steps": 100, "warmup_steps": 10, "decay_steps": 20, "half_life": 5} | wrong)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """``data`` with both stages, ``tokenizer`` and ``config.json``."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = load_tokenizer(tiny_tokenizer.write(folder / "tokenizer"))
    (folder / "config.json").write_text(json.dumps(RAW | {"vocab_size": tokenizer.vocab_size}))
    for stage in ("stable", "decay"):
        for split, count in (("train", 60), ("valid", 12)):
            path = folder / "data" / stage / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            chat = [{"role": "user", "content": "海在哪里？"}, {"role": "assistant", "content": "The sea."}]
            rows = [{"text": tiny_tokenizer.SENTENCES[i % 6]} for i in range(count)]
            rows = [{"messages": chat} if stage == "decay" and i % 2 else row for i, row in enumerate(rows)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(corpus, out, *more):
    inputs = ["--config", corpus / "config.json", "--tokenizer", corpus / "tokenizer", "--data", corpus / "data"]
    return ["minicpm_jax.pretrain", *inputs, "--save-path", out, *STEPS, *SIZES, *more]


def run(corpus, out, *more):
    return typed(*command(corpus, out, *more))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ran = run(corpus, out)
    assert ran.returncode == 0, ran.stderr
    return out


def test_windows_hold_every_token_from_bos_to_eos(corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer")
    windows = pack(corpus / "data" / "decay" / "train.jsonl", tokenizer, 16)
    rows = [json.loads(line) for line in (corpus / "data" / "decay" / "train.jsonl").open()]
    expected = []
    for row in rows:
        text = "text" in row
        ids = (
            tokenizer.encode(row["text"])
            if text
            else tokenizer.apply_chat(row["messages"], add_generation_prompt=False)
        )
        expected += [*ids, 2]
    flat = windows.reshape(-1).tolist()
    assert flat == expected[: len(flat)] and len(expected) - len(flat) < 16
    assert flat.count(1) == flat.count(2) + (flat[-1] != 2)


def test_batches_are_addressed_by_number():
    windows = np.arange(40, dtype=np.int32).reshape(10, 4)
    data, again = WindowBatches(windows, 2, seed=0), WindowBatches(windows, 2, seed=0)
    assert np.array_equal(data[7], again[7])
    assert np.array_equal(data.part(7, lambda rows: [1]), data[7][1:])
    first, second = (np.concatenate([data[i] for i in range(s, s + 5)]) for s in (0, 5))
    for order in (first, second):  # each pass holds every window once, in another order
        assert sorted(order[:, 0].tolist()) == list(range(0, 40, 4))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.concatenate([WindowBatches(windows, 2, seed=1)[i] for i in range(5)]))
    with pytest.raises(InputError, match="10 windows"):
        WindowBatches(windows, 11, seed=0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "line 2 is not JSON"),
        ("[1]", "line 2 is not an object"),
        ('{"words": 1}', "line 2: it has the keys words, which are no known form"),
        ('{"text": "a", "weight": 2}', 'line 2: it has "weight", which is not understood'),
        ('{"messages": [{"role": "assistant", "content": "a", "train": 0}]}', "line 2: .* pretraining trains all"),
    ],
)
def test_a_wrong_line_is_named(corpus, tmp_path, line, said):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "Hello"}\n' + line + "\n")
    with pytest.raises(InputError, match=said):
        pack(path, load_tokenizer(corpus / "tokenizer"), 4)


def test_packed_documents_are_trained_apart(corpus):
    """The loss of two documents in one window is that of each alone, weighted by their trained tokens."""
    config = ModelConfig.from_file(corpus / "config.json")
    model = initialize(config, jax.random.key(0))
    one, other = [1, 7, 8, 9, 2], [1, 20, 21, 2]
    loss = jax.jit(packed_loss, static_argnums=2)
    together = loss(model, jnp.array([one + other]), 1)
    alone = [loss(model, jnp.array([row]), 1) * (len(row) - 1) for row in (one, other)]
    assert float(together) == pytest.approx(float(sum(alone)) / (len(one) + len(other) - 2), rel=1e-5)


def first_updates(optimizer, gradients, weights):
    return jax.jit(lambda gradients, weights: optimizer.update(gradients, optimizer.init(weights), weights)[0])(
        gradients, weights
    )


def test_mup_groups_take_their_share_of_a_step(corpus):
    """The first Adam step moves every number by the learning rate times its group's share (weight decay apart)."""
    config = ModelConfig.from_file(corpus / "config.json")
    model = initialize(config, jax.random.key(0))
    weights = train.weights_of(model)
    optimizer = optimizers.mup_optimizer(config, 0.9, 0.95, weight_decay=0.0, clip=1e9)
    gradients = {name: np.ones(w.shape, w.dtype) for name, w in weights.items()}
    updates = first_updates(optimizer, gradients, weights)
    for name, update in updates.items():
        matrix = "proj" in name
        np.testing.assert_allclose(update, -0.5 if matrix else -1.0, rtol=1e-5, err_msg=name)
    decayed = optimizers.mup_optimizer(config, 0.9, 0.95, weight_decay=0.1, clip=1e9)
    updates = first_updates(decayed, {name: np.zeros(w.shape, w.dtype) for name, w in weights.items()}, weights)
    np.testing.assert_allclose(updates["model.embed_tokens.weight"], 0)
    name = "model.layers.mlp.up_proj.weight"
    np.testing.assert_allclose(updates[name], -0.5 * 0.1 * weights[name], rtol=1e-5)


def test_weight_decay_spares_lengths():
    """In fine-tuning: norms, and DoRA's magnitudes."""
    weights = {"model.norm.weight": jnp.ones(3), "q_proj": {"a": jnp.ones((2, 3)), "magnitude": jnp.ones(2)}}
    optimizer = optimizers.optimizer("adamw", 0.1, 1.0, ModelConfig())
    updates = first_updates(optimizer, jax.tree.map(jnp.zeros_like, weights), weights)
    assert (
        float(jnp.abs(updates["model.norm.weight"]).max()) == float(jnp.abs(updates["q_proj"]["magnitude"]).max()) == 0
    )
    np.testing.assert_allclose(updates["q_proj"]["a"], -0.1, rtol=1e-6)


def test_initialisation_is_mups(corpus):
    config = ModelConfig.from_file(corpus / "config.json")
    weights = train.weights_of(initialize(config, jax.random.key(0)))
    assert float(jnp.std(weights["model.embed_tokens.weight"])) == pytest.approx(0.1, rel=0.05)
    assert float(jnp.std(weights["model.layers.mlp.up_proj.weight"])) == pytest.approx(0.1 / math.sqrt(2), rel=0.05)
    assert float(jnp.ptp(weights["model.norm.weight"])) == 0


def test_a_run_learns_and_leaves_a_model(whole, corpus):
    records = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    assert [r["step"] for r in records] == [8, 10, 16, 20, 24]
    assert [r["stage"] for r in records] == ["stable", "stable", "stable", "decay", "decay"]
    assert records[-1]["stable_valid_loss"] < records[0]["stable_valid_loss"] < math.log(RAW["hidden_size"] * 15)
    checkpoint = open_checkpoint(whole / "model")
    assert checkpoint.dtype == "bfloat16" and checkpoint.eos_token_ids == (2,)
    assert (whole / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert load_tokenizer(whole / "model").encode("Hello") == load_tokenizer(corpus / "tokenizer").encode("Hello")


def test_a_killed_run_goes_on_as_if_it_had_not_been(corpus, whole, tmp_path):
    """Kill the process itself after its first checkpoint; the rest of the run has the same figures, bit for bit."""
    out = tmp_path / "out"
    killed = [sys.executable, "-m", *map(str, command(corpus, out))]
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "4").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait(60)
    stopped_early = not (out / "model").exists()
    refused = run(corpus, out)
    assert refused.returncode == 2 and "holds a run; add --resume to continue it" in refused.stderr
    # With the settings under the names that they had in earlier versions.
    settings = json.loads((out / "settings.json").read_text())
    settings |= {"steps": settings.pop("iters"), "seq_length": settings.pop("max_seq_length")}
    (out / "settings.json").write_text(json.dumps(settings))
    ran = run(corpus, out, "--resume")
    assert ran.returncode == 0, ran.stderr
    assert not stopped_early or "resuming after step" in ran.stdout
    assert figures(out) == figures(whole)
    assert (out / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_two_processes_train_as_one(corpus, whole, tmp_path):
    """Each of two devices; stopped in one of them, the run goes on in a single process of one device. Measured: losses
    within 1e-6."""
    out = tmp_path / "out"
    running = several_processes.start("-m", *command(corpus, out), "--mesh", "fsdp=2,tensor=2")
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and figures(out)) and running[1].poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running[1].send_signal(signal.SIGINT)
    first, second = several_processes.ends(running)
    assert (first.returncode, second.returncode) == (130, 130), first.stderr + second.stderr
    step = int(re.search(r"stopped after step (\d+) of 24; the same command with --resume", first.stdout)[1])
    assert second.stdout == "" and "Traceback" not in first.stderr + second.stderr
    assert 8 <= step < 24 and (out / "checkpoints" / str(step)).exists() and not (out / "model").exists()
    ended = run(corpus, out, "--resume")
    assert ended.returncode == 0 and f"resuming after step {step}" in ended.stdout, ended.stderr
    for mine, theirs in zip(figures(out), figures(whole), strict=True):
        numbers = [[record[name] for name in record if name != "stage"] for record in (mine, theirs)]
        np.testing.assert_allclose(*numbers, rtol=1e-5)


def export(monkeypatch, capsys, *arguments):
    """What the command says; of one that fails the error alone."""
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    try:
        command_line.run(main, Options, "export")
    except SystemExit as end:
        assert end.code == 2
        return capsys.readouterr().err
    return capsys.readouterr().out


def test_a_checkpoint_becomes_a_model(whole, tmp_path, monkeypatch, capsys):
    """The last one is what the run wrote at its end; one before it is another; a Llama has the same logits."""
    said = export(monkeypatch, capsys, "--checkpoint", whole, "--save-path", tmp_path / "last")
    assert said.startswith(f"step 24 of {whole}\n")
    for path in (whole / "model").iterdir():
        assert (tmp_path / "last" / path.name).read_bytes() == path.read_bytes()
    step = whole / "checkpoints" / "20"
    export(monkeypatch, capsys, "--checkpoint", step, "--save-path", tmp_path / "20", "--dtype", "float32")
    export(monkeypatch, capsys, "--checkpoint", whole, "--step", 20, "--to", "llama", "--save-path", tmp_path / "llama")
    earlier, last = (open_checkpoint(tmp_path / name).tensors["model.norm.weight"].read() for name in ("20", "last"))
    assert earlier.dtype == np.float32 and np.abs(earlier - last.astype(np.float32)).max() > 1e-4
    assert open_checkpoint(tmp_path / "llama").config.model_type == "llama"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "{whole}", "--step", 3], "holds no checkpoint of step 3; there are 20, 24."),
        (["--checkpoint", "{whole}/model"], "is no training run: it has no settings.json"),
        (["--checkpoint", "{whole}/checkpoints/20", "--step", 24], "is that of step 20, and --step is 24; give one."),
        (["--checkpoint", "{whole}", "--source", "nowhere"], "the run's tokenizer is not at nowhere any more"),
        (["--checkpoint", "{whole}", "--save-path", "{whole}/checkpoints/x"], "is inside the model folder"),
        (["--checkpoint", "{damaged}"], "checkpoints/24 is damaged ("),
    ],
)
def test_what_cannot_be_exported(whole, tmp_path, monkeypatch, capsys, arguments, said):
    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    for path in (damaged / "checkpoints" / "24" / "default").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:100])
    filled = [str(a).format(whole=whole, damaged=damaged) for a in arguments]
    out = [] if "--save-path" in filled else ["--save-path", tmp_path / "out"]
    error = export(monkeypatch, capsys, *filled, *out)
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_training_continues_from_any_checkpoint_at_its_stage(corpus, whole, tmp_path):
    """The decay stage alone, from the weights of a dense model and from a mixture of experts made of it."""
    upcycled = typed(
        "weights_io.upcycle", "--model", whole / "model", "--num-experts", 4, "--save-path", tmp_path / "moe"
    )
    assert upcycled.returncode == 0, upcycled.stderr
    for start, name in ((whole / "model", "dense"), (tmp_path / "moe", "mixture")):
        more = command(corpus, tmp_path / name, "--init-from", start, "--from-step", 16, "--learning-rate", 1e-4)
        more = [a for i, a in enumerate(more) if "--config" not in (a, more[i - 1])]
        ran = typed(*more)
        assert ran.returncode == 0, ran.stderr
        records = figures(tmp_path / name)
        assert [r["step"] for r in records] == [20, 24] and {r["stage"] for r in records} == {"decay"}
        assert records[0]["tokens"] == 4 * 2 * 32
        assert (
            records[-1]["decay_valid_loss"] < figures(whole)[-1]["decay_valid_loss"] + 0.05
        )  # not from nothing: 3 more
        assert open_checkpoint(tmp_path / name / "model").config.num_experts == (4 if name == "mixture" else 0)


def test_a_run_that_breaks_down_keeps_what_was_saved(corpus, tmp_path):
    """Step 2 is none of those that are reported."""
    ran = run(corpus, tmp_path / "out", "--learning-rate", "1e30", "--save-every", "1")
    assert ran.returncode == 2 and "of step 2 is nan (its first example begins with ids" in ran.stderr
    assert [path.name for path in (tmp_path / "out" / "checkpoints").glob("[0-9]*")] == ["1"]


def figures(out: Path):
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [{key: value for key, value in record.items() if key not in tiny.MEASURED} for record in records]


def test_a_half_written_line_of_figures_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n{"step": 3, "lo')
    metrics = Metrics(path, start=1)
    metrics.write({"step": 2, "loss": 2.4})
    assert [json.loads(line)["loss"] for line in path.open()] == [3.0, 2.4]


def test_figures_go_to_wandb_under_the_name_of_the_project(tmp_path, monkeypatch):
    """From the process that writes alone; by default the project is the folder."""
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = lambda **options: (
        calls.append(options["project"])
        or types.SimpleNamespace(
            log=lambda record, step: calls.append((step, record["loss"])), finish=lambda: calls.append("finished")
        )
    )
    calls: list = []
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name, writing in (("mine", True), (None, True), (None, False)):
        metrics = Metrics(tmp_path / "metrics.jsonl", 0, "wandb", name, writing)
        metrics.write({"step": 1, "loss": 2.0})
        metrics.close()
    assert calls == ["mine", (1, 2.0), "finished", tmp_path.name, (1, 2.0), "finished"]
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr("minicpm_data.metrics.find_spec", lambda name: None)
    with pytest.raises(InputError, match="report_to tensorboard needs a package .*: pip install tensorboardX"):
        check_reporter("tensorboard")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--iters", "0"], "--iters is 0"),
        (["--max-seq-length", "1"], "--max-seq-length is 1"),
        (["--learning-rate", "-1"], "--learning-rate is -1"),
        (["--beta2", "1"], "--beta2 is 1"),
        (["--decay-steps", "30"], "do not fit into 24"),
        (["--config", "{corpus}/none.json"], "none.json does not exist"),
        (["--data", "{corpus}"], "train.jsonl does not exist"),
        (["--tokenizer", "{corpus}"], "neither a tokenizer.json nor a tokenizer.model"),
        (["--init-from", "pico"], "give either --config"),
        (["--from-step", "5"], "it is for --init-from"),
        (["--mesh", "fsdp=3"], "is for 3 devices; there are"),
        (["--save-path", "{corpus}"], "is not empty and holds no run"),
        (["--save-path", "{corpus}/config.json"], "is a file"),
        (["--batch-size", "4000"], "do not fill one batch"),
        (["--learning-rate", "1e30"], "of step 2 is "),
    ],
)
def test_bad_input(corpus, tmp_path, arguments, said):
    ran = run(corpus, tmp_path / "out", *(a.format(corpus=corpus) for a in arguments))
    assert ran.returncode == 2, ran.stderr
    assert said in ran.stderr and "Traceback" not in ran.stderr
    assert not (tmp_path / "out" / "model").exists()


def test_another_run_is_not_continued(corpus, whole, tmp_path):
    before = sorted(os.listdir(whole)), figures(whole)
    ran = run(corpus, whole, "--resume", "--seed", "1")
    assert ran.returncode == 2 and "another --seed" in ran.stderr
    changed = tmp_path / "data"
    shutil.copytree(corpus / "data", changed)
    with (changed / "stable" / "valid.jsonl").open("a") as file:
        file.write(json.dumps({"text": "One more. " * 40}) + "\n")
    ran = run(corpus, whole, "--resume", "--data", changed)
    assert ran.returncode == 2 and "another --data" in ran.stderr
    assert (sorted(os.listdir(whole)), figures(whole)) == before
