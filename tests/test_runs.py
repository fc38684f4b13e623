"""A run's folder through damage, kills and a second run: nothing is lost, and nothing that is damaged is taken."""

import asyncio
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_training import BACKENDS, part

from minicpm_data.metrics import Metrics, read_records
from minicpm_data.training.checkpoint_folder import SUMS, CheckpointFolder
from minicpm_data.training.run_folder import LOCK, SETTINGS, check_folder, using
from weights_io.errors import InputError
from weights_io.files.partial import partial


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    pytest.importorskip("mlx.core" if request.param == "minicpm_mlx" else "jax")
    return request.param


def state_of(backend, number):
    array = part(backend, "model").jnp.array if backend == "minicpm_jax" else part(backend, "model").mx.array
    values = np.random.default_rng(number).normal(size=(48, 64)).astype(np.float32)
    return {"weights": {"a.b": array(values)}, "moments": {"m": array(values[0])}}


def checkpoints_of(backend, folder):
    return part(backend, "training.run_checkpoints").Checkpoints(folder)


@pytest.fixture(scope="module")
def saved(backend, tmp_path_factory):
    """Checkpoints of the steps 10 and 20."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = checkpoints_of(backend, folder)
    for step in (5, 10, 20):
        checkpoints.save(step, state_of(backend, step))
    return folder


def restored(backend, folder):
    found = checkpoints_of(backend, folder).restore(state_of(backend, 0))
    return np.array(found["weights"]["a.b"])


def test_a_state_comes_back(backend, saved):
    assert sorted(path.name for path in saved.iterdir()) == ["10", "20"]
    np.testing.assert_array_equal(restored(backend, saved), np.array(state_of(backend, 20)["weights"]["a.b"]))


def flipped(path, chance):
    data = bytearray(path.read_bytes())
    place = chance.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


DAMAGE = {
    "flipped": flipped,
    "cut": lambda path, chance: path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)]),
    "longer": lambda path, chance: path.write_bytes(path.read_bytes() + b"\0"),
    "emptied": lambda path, chance: path.write_bytes(b""),
    "missing": lambda path, chance: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_anywhere_in_a_checkpoint_is_found(backend, saved, tmp_path, damage):
    """In each of its files; the sentence names the last whole one, from which the run then goes on."""
    chance = random.Random(damage)
    files = [path.relative_to(saved / "20") for path in sorted((saved / "20").rglob("*")) if path.is_file()]
    assert SUMS in map(str, files)
    for number, name in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        DAMAGE[damage](folder / "20" / name, chance)
        with pytest.raises(InputError) as error:
            restored(backend, folder)
        said = str(error.value)
        assert re.search(r"checkpoint of step 20 cannot be read \(.+\); delete \S+/20 and --resume goes on from", said)
        assert said.endswith("from step 10.") and "\n" not in said
    shutil.rmtree(folder / "20")
    np.testing.assert_array_equal(restored(backend, folder), np.array(state_of(backend, 10)["weights"]["a.b"]))


def test_every_flipped_bit_of_the_checksums_is_found(tmp_path):
    """Also one that changes the case of a hexadecimal letter, which is the same number."""
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(10, lambda folder: (folder / "state").write_bytes(bytes(range(99))) and None)
    path = tmp_path / "10" / SUMS
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        assert checkpoints.wrong(10, lambda folder: False), path.read_bytes()


def test_an_empty_or_renamed_checkpoint_is_found(backend, saved, tmp_path):
    shutil.copytree(saved / "10", tmp_path / "10")
    (tmp_path / "20").mkdir()
    with pytest.raises(InputError, match=r"step 20 cannot be read .*20 and --resume goes on from step 10\."):
        restored(backend, tmp_path)
    (tmp_path / "20").rmdir()
    (tmp_path / "10").rename(tmp_path / "20")
    with pytest.raises(InputError, match=r"saved as that of step 10\); delete .*20 and start a new run"):
        restored(backend, tmp_path)
    sums = json.loads((tmp_path / "20" / SUMS).read_text())
    (tmp_path / "20" / SUMS).write_text(json.dumps(sums | {"step": 20}))  # the state says it too
    with pytest.raises(InputError, match="its state is that of step 10"):
        restored(backend, tmp_path)


def test_where_several_are_damaged_all_are_named(backend, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for step in (10, 20):
        flipped(tmp_path / "run" / str(step) / SUMS, random.Random(0))
    with pytest.raises(
        InputError, match=r"step 20 .*; delete \S+/20, \S+/10 and start a new run: no checkpoint is whole"
    ):
        restored(backend, tmp_path / "run")


# orbax leaves an event loop behind when it fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_state_of_another_run_is_refused(backend, saved):
    other = state_of(backend, 0)
    other["weights"]["a.b"] = other["weights"]["a.b"][:5]
    with pytest.raises(InputError, match="holds the state of another run"):
        checkpoints_of(backend, saved).restore(other)


def save_as_before(backend, folder, step):
    """As it was done before there were checksums."""
    state = state_of(backend, step)
    if backend == "minicpm_jax":
        import orbax.checkpoint as ocp

        with ocp.CheckpointManager(folder) as manager:
            manager.save(step, args=ocp.args.StandardSave((state["weights"], state["moments"])))
    else:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        (folder / str(step)).mkdir(parents=True)
        mx.save_safetensors(str(folder / str(step) / "state.safetensors"), dict(tree_flatten(state)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_note(backend, tmp_path, capsys):
    for step in (1, 2):
        save_as_before(backend, tmp_path, step)
    state = state_of(backend, 0)
    state = (state["weights"], state["moments"]) if backend == "minicpm_jax" else state
    found = checkpoints_of(backend, tmp_path).restore(state)
    weights = found[0] if backend == "minicpm_jax" else found["weights"]
    np.testing.assert_array_equal(np.array(weights["a.b"]), np.array(state_of(backend, 2)["weights"]["a.b"]))
    said = "note: the checkpoint of step 2 was saved by an earlier version, without checksums"
    assert said in capsys.readouterr().err
    for path in (tmp_path / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"step 2 cannot be read .*2 and --resume goes on from step 1\."):
        checkpoints_of(backend, tmp_path).restore(state)


def test_an_interrupt_while_saving_leaves_the_last_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, lambda path: (path / "state").write_bytes(b"one"))

    def interrupted(path):
        (path / "state").write_bytes(b"tw")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.save(2, interrupted)
    assert CheckpointFolder(tmp_path).steps == [1] and folder.wrong(1, lambda path: False) is None
    folder.save(2, lambda path: (path / "state").write_bytes(b"two"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


# A run without a model: each step is a line, each third a checkpoint. Hundreds of both in a second.
WRITER = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from minicpm_data.training.checkpoint_folder import CheckpointFolder
from minicpm_data.metrics import Metrics
from minicpm_data.training.run_folder import check_folder, using
out = Path({out!r})
with using(out, {{"seed": 1}}, resume=check_folder(out, {resume})):
    checkpoints = CheckpointFolder(out / "checkpoints")
    if checkpoints.latest:
        checkpoints.check(lambda path: False)
    step = checkpoints.latest
    metrics = Metrics(out / "metrics.jsonl", step)
    print("begun", flush=True)
    while step < 100000:
        step += 1
        metrics.write({{"step": step, "loss": 1 / step, "learning_rate": 1e-3, "more": "x" * (step % 400)}})
        if step % 3 == 0:
            checkpoints.save(step, lambda path: [(path / n).write_bytes(bytes(9000)) for n in "abc"])
"""


@pytest.mark.slow
def test_a_run_is_whole_after_kills_at_any_moment(tmp_path):
    """Lines of whole steps in order, each once; whole checkpoints; no leftovers after the next start."""
    out, chance = tmp_path / "out", random.Random(13)
    last = 0
    for kill in range(12):
        paths = [str(Path(__file__).parent.parent)]
        script = WRITER.format(paths=paths, out=str(out), resume=kill > 0)
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "begun\n"
        assert not list(out.glob(".*.partial")), "what the one before left is gone"
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        folder = CheckpointFolder(out / "checkpoints")
        assert folder.latest >= last and len(folder.steps) <= 3
        assert [folder.wrong(step, lambda path: False) for step in folder.steps] == [None] * len(folder.steps)
        last = folder.latest
        steps = [record["step"] for record in read_records(out / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= last
    assert last > 20
    Metrics(out / "metrics.jsonl", last)
    text = (out / "metrics.jsonl").read_text()
    assert text.endswith("}\n") and [json.loads(line)["step"] for line in text.splitlines()] == [*range(1, last + 1)]


@pytest.mark.parametrize(
    ("damaged", "kept", "said"),
    [
        ('{"step": 1, "loss": 3.0}\n{"step": 2, "lo', [1], ""),
        ('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}', [1, 2], ""),
        ('{"step": 1}\n{"step": 2}\n{"step": 2}\n{"step": 3}\n{"step": 4}\n', [1, 2, 3], ""),
        ('{"step": 1}\n{"stxx\n{"step": 3}\n', [1, 3], "damaged in line 2, which is left out"),
        ('{"step": 1}\n\0\0\0\0}\n7\n{"step": 3}\n', [1, 3], "damaged in line 2, 3"),
        ("", [], ""),
    ],
)
def test_metrics_are_cut_back_to_whole_steps(tmp_path, capsys, damaged, kept, said):
    (tmp_path / "metrics.jsonl").write_text(damaged)
    Metrics(tmp_path / "metrics.jsonl", 3)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == kept and (not text or text.endswith("\n"))
    assert said in capsys.readouterr().err and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_picture_leaves_out_what_is_no_number(tmp_path):
    figures = {"loss": 3.0, "learning_rate": 0.1}
    lines = [{"step": 1, **figures}, {"step": 2}, {"step": 3, **figures, "loss": "x"}, {"step": 4, **figures}]
    lines += [{"step": 5, **figures, "valid_loss": [1]}, {"step": 6, **figures, "loss": 10**400}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Metrics(tmp_path / "metrics.jsonl", 9).draw(tmp_path / "loss.png", by="step")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_metrics_that_are_no_file_of_figures_are_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="metrics.jsonl: it is a pipe"):
        Metrics(tmp_path / "metrics.jsonl", 3)
    (tmp_path / "large.jsonl").touch()
    os.truncate(tmp_path / "large.jsonl", 20 << 30)  # holes alone
    with pytest.raises(InputError, match="large.jsonl has 21474836480 bytes"):
        Metrics(tmp_path / "large.jsonl", 3)


def begun(folder, step=1):
    """A run that has saved something."""
    with using(folder, {"seed": 1}):
        CheckpointFolder(folder / "checkpoints").save(step, lambda path: (path / "state").write_bytes(b"x"))
    return folder


def test_a_run_that_is_not_there_is_not_gone_on_with(tmp_path):
    run = begun(tmp_path / "adapters-sums")
    (tmp_path / "adapters-sum").mkdir()
    for name in ("adapter-sums", "adapters-sum"):
        with pytest.raises(InputError, match=f"{name} holds no run to resume; did you mean {run}\\?"):
            check_folder(tmp_path / name, resume=True)
    with pytest.raises(InputError, match="holds no run to resume; leave out --resume to begin one"):
        check_folder(tmp_path / "model-of-another-kind", resume=True)
    (tmp_path / "adapters-sum" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run to resume; did you mean"):
        check_folder(tmp_path / "adapters-sum", resume=True)
    assert check_folder(run, resume=True) and not check_folder(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters-sum", "adapters-sums"]


def test_a_run_that_was_killed_before_it_began_is_in_nobodys_way(tmp_path):
    (tmp_path / f".{SETTINGS}.0123abcd.partial").write_text("{")
    (tmp_path / LOCK).write_text("process 1 on a host")
    assert not check_folder(tmp_path)
    begun(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", LOCK, SETTINGS]


def test_what_a_run_left_is_not_written_over(tmp_path):
    begun(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    for resume in (False, True):
        with pytest.raises(InputError, match="holds adapter_model.safetensors of a run without checkpoints"):
            check_folder(tmp_path, resume)


HOLDER = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from minicpm_data.training.run_folder import using
with using(Path({folder!r}), {{"seed": 1}}, resume=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_by_another_run_is_refused(tmp_path):
    """Until that is killed. Nothing in it changes."""
    begun(tmp_path)
    script = HOLDER.format(paths=[str(Path(__file__).parent.parent)], folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        said = rf"is in use by another run \(process {process.pid} on .+\); wait until it ends, stop it, or choose"
        with pytest.raises(InputError, match=said):
            check_folder(tmp_path, resume=True)
        with pytest.raises(InputError, match=said), using(tmp_path, {"seed": 1}, resume=True):
            pass
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    finally:
        process.kill()
        process.communicate()
    with using(tmp_path, {"seed": 1}, resume=True):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    begun(tmp_path / "out")
    assert check_folder(tmp_path / "out", resume=True)
    assert "out has no locks; start no second run in this folder" in capsys.readouterr().err
    left = tmp_path / ".file.0123abcd.partial"
    left.write_text("it may be another's")
    with partial(tmp_path / "file") as path:
        path.write_text("mine")
    assert left.exists() and (tmp_path / "file").read_text() == "mine"
    os.utime(left, (0, 0))  # nobody has written it for days
    with partial(tmp_path / "file") as path:
        path.write_text("again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_other_settings_are_named_by_three(tmp_path):
    settings = dict.fromkeys("abcde", 1)
    with using(tmp_path, settings):
        CheckpointFolder(tmp_path / "checkpoints").save(1, lambda path: (path / "state").write_bytes(b"x"))
    with (
        pytest.raises(InputError, match="holds a run with another a, b, c and 2 more; choose another folder"),
        using(tmp_path, dict.fromkeys(settings, 2), resume=True),
    ):
        pass


@pytest.mark.parametrize("content", ["", '{"a": 1', "[]", '{"a": 1, "a": 2}'])
def test_damaged_settings_are_named(tmp_path, content):
    with using(tmp_path, {"a": 1}):
        CheckpointFolder(tmp_path / "checkpoints").save(1, lambda path: (path / "state").write_bytes(b"x"))
    (tmp_path / "settings.json").write_text(content)
    with (
        pytest.raises(InputError, match="settings.json is damaged, .* choose another folder"),
        using(tmp_path, {"a": 1}, resume=True),
    ):
        pass


def test_other_valid_examples_are_noted(tmp_path, capsys):
    with using(tmp_path, {}, notes={"valid": "one"}):
        CheckpointFolder(tmp_path / "checkpoints").save(1, lambda path: (path / "state").write_bytes(b"x"))
    for valid, notes in (("one", 0), ("other", 1)):
        with using(tmp_path, {}, resume=True, notes={"valid": valid}):
            pass
        assert capsys.readouterr().err.count("note: the validation examples differ") == notes


def test_a_write_that_ends_after_its_loop_prints_nothing():
    """As tensorstore's do after the one that met a full disk: from a thread in which nobody can catch anything."""
    checkpoints = pytest.importorskip("minicpm_jax.training.run_checkpoints")
    with checkpoints._own_loops():
        loop = asyncio.new_event_loop()
    found = []
    loop.call_soon_threadsafe(found.append, 1)
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    loop.call_soon_threadsafe(found.append, 2)
    assert found == [1] and not isinstance(asyncio.get_event_loop_policy(), checkpoints._Policy)
