"""Pretraining in both backends: the same steps from the same weights, and a run of MLX that is stopped and goes on."""

import json
import shutil
import signal

import pytest
import tiny_model
import tiny_tokenizer
import tiny_training as tiny
from documented_commands import typed
from tiny_training import BACKENDS, part

pytest.importorskip("jax")
pytest.importorskip("mlx.core")

from minicpm_data.training import pretraining
from minicpm_data.training.options import PretrainOptions
from minicpm_jax.pretrain import Options as JaxOptions
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError

OPTIONS = {"minicpm_jax": JaxOptions, "minicpm_mlx": PretrainOptions}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """``data`` of both stages, a ``tokenizer``, a dense ``model``, a ``minicpm3`` and a ``mixture``."""
    root = tmp_path_factory.mktemp("world")
    tiny_model.write(root, **tiny.UNTIED)
    shutil.move(tiny_model.write(root / "moe", **tiny.MOE), root / "mixture")
    shutil.move(tiny_model.write(root / "latent", **tiny.MINICPM3), root / "minicpm3")
    texts = [{"text": text} for text in tiny_tokenizer.SENTENCES]
    for stage, rows in (("stable", texts), ("decay", [*tiny.chats(6), *texts])):
        tiny.write_data(root / "data" / stage, rows * 6, valid=rows)
    return root


def options(backend, world, out, model="model", **changes):
    where = {"tokenizer": world / "tokenizer", "data": world / "data", "save_path": out}
    where["init_from"] = str(world / model)
    sizes = {"iters": 6, "warmup_steps": 2, "decay_steps": 2, "half_life": 2.0, "batch_size": 2, "max_seq_length": 32}
    often = {"steps_per_eval": 1, "save_every": 2, "save_dtype": "float32", "dtype": "float32"}
    return OPTIONS[backend](**{**where, **sizes, **often, **changes})


def pretrain(backend, world, out, **changes):
    pretraining.pretrain(options(backend, world, out, **changes), part(backend, "backend").pretrainer)
    return figures(out)


def figures(out):
    return [{name: x for name, x in record.items() if name not in tiny.MEASURED} for record in tiny.records(out)]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A run of MLX that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    pretrain("minicpm_mlx", world, out)
    return out


@pytest.mark.parametrize("model", ["minicpm3", "mixture"])
def test_the_steps_are_the_same_in_both_backends(world, tmp_path, model):
    """Warm-up, stable stage and decay, each with data of its own. Measured: losses within 2e-7, norms within 1e-5."""
    runs = [pretrain(backend, world, tmp_path / backend, model=model, grad_checkpoint=True) for backend in BACKENDS]
    for one, other in zip(*runs, strict=True):
        assert one.keys() == other.keys() and one["stage"] == other["stage"] and one["tokens"] == other["tokens"]
        for name in ("loss", "learning_rate", "stable_valid_loss", "decay_valid_loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), (one["step"], name)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    assert runs[0][-1]["loss"] < runs[0][0]["loss"]
    tensors = [open_checkpoint(tmp_path / backend / "model").tensors for backend in BACKENDS]
    tiny.same(*({name: tensor.read() for name, tensor in of.items()} for of in tensors), 1e-3)


def test_a_stopped_run_of_mlx_goes_on_as_if_it_had_not_been(world, whole, tmp_path, monkeypatch, capsys):
    trainer = part("minicpm_mlx", "training.pretraining").Pretrainer
    step = trainer.step

    def interrupted(self, batches, rate, number):
        if number == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, batches, rate, number)

    monkeypatch.setattr(trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain("minicpm_mlx", world, tmp_path / "out")
    assert "stopped after step 3 of 6; the same command with --resume goes on" in capsys.readouterr().out
    assert not (tmp_path / "out" / "model").exists()
    monkeypatch.setattr(trainer, "step", step)
    assert pretrain("minicpm_mlx", world, tmp_path / "out", resume=True) == figures(whole)
    assert "resuming after step 3" in capsys.readouterr().out
    ours, theirs = (out / "model" / "model.safetensors" for out in (tmp_path / "out", whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert (whole / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_mlx_makes_a_new_model_and_goes_on_from_a_step(world, tmp_path):
    new = pretrain("minicpm_mlx", world, tmp_path / "new", init_from=None, config=world / "model" / "config.json")
    later = pretrain("minicpm_mlx", world, tmp_path / "later", init_from=str(tmp_path / "new" / "model"), from_step=4)
    assert new[-1]["loss"] < new[0]["loss"] < 7  # log of the vocabulary is 6.2
    assert [record["step"] for record in later] == [5, 6] and {record["stage"] for record in later} == {"decay"}
    assert later[0]["decay_valid_loss"] < new[0]["decay_valid_loss"]


def test_a_run_of_the_other_backend_is_left_as_it_is(world, whole, tmp_path):
    """A JAX run whose settings name no backend, as those of earlier versions, is JAX's."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    with pytest.raises(InputError, match="holds a run with another backend"):
        pretrain("minicpm_jax", world, out, resume=True)
    settings = json.loads((out / "settings.json").read_text())
    assert settings.pop("backend") == "minicpm_mlx"
    (out / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="holds a run with another backend"):
        pretrain("minicpm_mlx", world, out, resume=True)
    assert figures(out) == figures(whole)


def test_the_export_of_jax_names_a_run_of_mlx(whole, tmp_path):
    from minicpm_jax.export import Options, main

    with pytest.raises(InputError, match="is a run of MLX, whose checkpoints this command does not read"):
        main(Options(whole, tmp_path / "none"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--beta1", "1"], "--beta1 is 1.0; it must be below 1"),
        (["--learning-rate", "inf"], "--learning-rate is inf; it must be finite"),
        (["--decay-steps", "30"], "do not fit into 6"),
    ],
)
def test_bad_input_of_the_command(world, tmp_path, flags, said):
    inputs = ["--init-from", world / "model", "--tokenizer", world / "tokenizer", "--data", world / "data"]
    inputs += ["--save-path", tmp_path / "out", "--iters", 6, "--warmup-steps", 1, "--decay-steps", 2, *flags]
    ran = typed("minicpm_mlx.pretrain", *inputs)
    assert ran.returncode == 2 and said in ran.stderr and "Traceback" not in ran.stderr, ran.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_that_breaks_down_keeps_what_was_saved(world, tmp_path):
    with pytest.raises(InputError, match=r"of step 2 is nan \(its first example begins with ids \d+ "):
        pretrain("minicpm_mlx", world, tmp_path / "out", learning_rate=1e30, save_every=1)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").glob("[0-9]*")] == ["1"]
