"""Several processes run one command: they meet, train and read as one would, and the first alone writes."""

import json
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
import several
import tiny_training as tiny
from test_pretrain import command, corpus, figures, whole  # noqa: F401  (fixtures)

pytest.importorskip("jax")

from minicpm_jax import hosts
from minicpm_jax.placement import Placement
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.files.tensor import FileTensor

ADDRESS = {"coordinator_address": "127.0.0.1:1234", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"process_id": 2}, "--process-id is 2; the 2 processes of --num-processes have the ids 0 to 1."),
        ({"process_id": -1}, "--process-id is -1"),
        ({"num_processes": 0}, "--num-processes is 0"),
        ({"process_id": None}, "--process-id must be given too"),
        ({"coordinator_address": "127.0.0.1"}, "127.0.0.1 is not of the form 10.0.0.1:1234"),
        ({"coordinator_address": "127.0.0.1:99999"}, "127.0.0.1:99999 is not of the form"),
        ({"distributed": True}, "--distributed finds the other processes by itself"),
        ({"join_timeout": 0}, "--join-timeout is 0"),
    ],
)
def test_flags_that_cannot_be(changes, said):
    options = Placement(**{**ADDRESS, **changes})
    with pytest.raises(InputError) as error:
        options.check_placement()
    assert said in str(error.value) and "\n" not in str(error.value)


def met(*processes, patience=0.5):
    """What each process, given as (how many there are, number), has to say about the others."""
    with several.socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    said = ["" for _ in processes]

    def join(place, count, number):
        try:
            hosts.meet(address, count, number, patience)
        except InputError as error:
            said[place] = str(error).replace(address, "ADDRESS")

    threads = [threading.Thread(target=join, args=(i, *process)) for i, process in enumerate(processes)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return said


def test_processes_meet():
    assert met((3, 1), (3, 0), (3, 2), patience=20) == ["", "", ""]
    assert met((1, 0)) == [""]


def test_processes_that_do_not_meet_say_why():
    assert (
        met((3, 0), (3, 2)) == ["of the 3 processes, 1 did not come; start them, or give another --join-timeout."] * 2
    )
    assert met((2, 1)) == ["nobody answers at --coordinator-address ADDRESS; process 0 must run there."]
    assert met((3, 0), (3, 1), (3, 1)) == ["two processes have --process-id 1; give each its own."] * 3
    assert met((3, 0), (2, 1)) == ["--num-processes is 3 in one process and 2 in another; give all the same."] * 2
    with pytest.raises(InputError, match=r"nowhere.invalid is not known here"):
        hosts.meet("nowhere.invalid:1234", 2, 1, 1)
    with several.socket.create_server(("", 0)) as taken:
        with pytest.raises(InputError, match="cannot listen at port"):
            hosts.meet(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0, 1)


def test_pretraining_in_two_processes_is_that_of_one(corpus, whole, tmp_path):  # noqa: F811
    """Stopped in one of them, it goes on in a single process, over another mesh. Measured: losses within 1e-6."""
    out = tmp_path / "out"
    run = command(corpus, out)[1:]
    running = several.start(*run, "--mesh", "fsdp=2,tensor=2")
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "4").exists() and running[1].poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running[1].send_signal(signal.SIGINT)
    first, second = several.ends(running)
    assert (first.returncode, second.returncode) == (130, 130), first.stderr + second.stderr
    step = int(re.search(r"stopped after step (\d+) of 24; the same command with --resume", first.stdout)[1])
    assert second.stdout == "" and "Traceback" not in first.stderr + second.stderr
    assert 4 < step < 24 and (out / "checkpoints" / str(step)).exists() and not (out / "model").exists()
    refused = several.run(*run, "--mesh", "fsdp=2,tensor=2", "--resume", "--seed", 1)
    for process in refused:
        assert process.returncode == 2 and process.stderr.count("holds a run with another seed") == 1
    ended = several.alone(*run, "--mesh", "data=2", "--resume", devices=2)
    assert ended.returncode == 0 and f"going on after step {step}" in ended.stdout, ended.stderr
    for mine, theirs in zip(figures(out), figures(whole), strict=True):
        numbers = [[record[name] for name in record if name != "stage"] for record in (mine, theirs)]
        np.testing.assert_allclose(*numbers, rtol=1e-5)
    one, other = (open_checkpoint(path / "model").tensors for path in (out, whole))
    tiny.same(
        {n: t.read().astype("f4") for n, t in one.items()}, {n: t.read().astype("f4") for n, t in other.items()}, 0.02
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tiny.write_world(tmp_path_factory.mktemp("world"))
    tiny.write_data(root / "pairs", tiny.preferences(10), valid=tiny.preferences(3))
    return root


def training(world, **changes):
    options = tiny.lora(world, world, iters=2, **changes)
    default = type(options)()
    given = {name: value for name, value in vars(options).items() if value != getattr(default, name)}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.slow
def test_pairs_in_two_processes_are_those_of_one(world, tmp_path):
    """The chosen answers of a batch lie with one process, the rejected ones with the other."""
    flags = training(world, data=world / "pairs", loss="dpo", dropout=0.0, adapter_path=tmp_path / "alone")
    assert several.alone("-m", "minicpm_jax.lora", *flags).returncode == 0
    flags += ["--adapter-path", tmp_path / "two", "--mesh", "fsdp=2,tensor=2"]
    first, second = several.run("-m", "minicpm_jax.lora", *flags)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert second.stdout == "" and first.stdout.count("Iter 2: ") == 1
    records = [tiny.records(tmp_path / name) for name in ("alone", "two")]
    for name in ("loss", "gradient_norm", "margin", "valid_loss"):
        numbers = [[record[name] for record in of if name in record] for of in records]
        np.testing.assert_allclose(*numbers, rtol=1e-5, atol=1e-6, err_msg=name)
    assert (tmp_path / "two" / "adapter_model.safetensors").exists()


def test_what_does_not_fit_is_said_in_each_process(world, tmp_path):
    flags = training(world, adapter_path=tmp_path / "out", batch_size=3)
    for process in several.run("-m", "minicpm_jax.lora", *flags, "--mesh", "fsdp=4"):
        assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
        assert process.stderr == "error: --batch-size 3 does not divide over the 4 devices of fsdp.\n"
    seeds = [["--seed", "1"], ["--seed", "2"]]
    for process in several.run("-m", "minicpm_jax.lora", *training(world, adapter_path=tmp_path / "out"), more=seeds):
        assert process.returncode == 2 and "process 1 has other options, another model or other data" in process.stderr
    assert not (tmp_path / "out").exists()


def test_an_answer_of_two_processes_is_that_of_one(world):
    answer = ["-m", "minicpm_jax.generate", "--model", world / "model", "--prompt", "The fox", "-m", 6]
    expected = several.alone(*answer)
    first, second = several.run(*answer, "--mesh", "tensor=2,fsdp=2")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == expected.stdout != "" and second.stdout == ""
    assert "tokens-per-sec" in first.stderr and "tokens-per-sec" not in second.stderr


READING = """
import collections, json, sys
import tyro
from minicpm_jax.placement import Placement
from weights_io.files.tensor import FileTensor
read, original = collections.Counter(), FileTensor.read
def counted(tensor, index=()):
    array = original(tensor, index)
    read[tensor.source.name] += array.nbytes
    return array
FileTensor.read = counted
options = tyro.cli(Placement, args=sys.argv[2:])
mesh = options.placement()["mesh"]
from minicpm_jax import load
from minicpm_jax.train import weights_of
model, _ = load(sys.argv[1], mesh=mesh)
held = sum(max(s.data.nbytes for s in w.addressable_shards) for w in weights_of(model).values())
print(json.dumps([sum(read.values()), held]), file=sys.stderr)
"""


def test_columns_are_read_without_what_lies_between_them(tmp_path, monkeypatch):
    numbers = np.arange(12 * 1024, dtype=np.float32).reshape(12, 1024)
    numbers.tofile(tmp_path / "numbers")
    tensor = FileTensor(tmp_path / "numbers", 0, numbers.dtype, numbers.shape, (1024, 1))
    read, original = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *call: read.append(original(*call)) or read[-1])
    here = (slice(3, 9), slice(512, 1024))
    np.testing.assert_array_equal(tensor.read(here), numbers[here])
    assert sum(read) == 6 * 512 * 4
    (tmp_path / "numbers").write_bytes(b"short")
    with pytest.raises(TypeError, match="too small"):
        tensor.read(here)


def test_each_process_reads_what_its_devices_hold(world):
    """Rows and columns of the files: half of them each, where one axis of the mesh lies over both processes."""
    checkpoint = open_checkpoint(world / "model")
    for process in several.run("-c", READING, world / "model", "--mesh", "fsdp=2,data=2"):
        assert process.returncode == 0, process.stderr
        read, held = json.loads(process.stderr.splitlines()[-1])
        assert read == held == checkpoint.nbytes // 2
