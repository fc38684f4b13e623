"""Several processes run one command: they meet, train and read as one would, and the first alone writes."""

import json
import os
import threading
import time

import numpy as np
import pytest
import several_processes
import tiny_training as tiny
from documented_commands import typed

from minicpm_jax.parallel import rendezvous

pytest.importorskip("jax")

from minicpm_jax.options import Placement
from weights_io.adapters import read_adapter
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.files.tensor import FileTensor

ADDRESS = {"coordinator_address": "127.0.0.1:1234", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"process_id": 2}, "process_id is 2; the 2 processes of num_processes have the ids 0 to 1."),
        ({"process_id": -1}, "process_id is -1"),
        ({"num_processes": 0}, "num_processes is 0"),
        ({"process_id": None}, "--process-id must be given too"),
        ({"coordinator_address": "127.0.0.1"}, "127.0.0.1 is not of the form 10.0.0.1:1234"),
        ({"coordinator_address": "127.0.0.1:99999"}, "127.0.0.1:99999 is not of the form"),
        ({"distributed": True}, "distributed finds the other processes by itself"),
        ({"join_timeout": 0}, "join_timeout is 0"),
    ],
)
def test_flags_that_cannot_be(changes, said):
    options = Placement(**{**ADDRESS, **changes})
    with pytest.raises(InputError) as error:
        options.check_placement()
    assert said in str(error.value) and "\n" not in str(error.value)


def met(*processes, patience=0.5):
    """What each process, given as (how many there are, number), has to say about the others."""
    with several_processes.socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    said = ["" for _ in processes]

    def join(place, count, number):
        try:
            rendezvous.meet(address, count, number, patience)
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
        rendezvous.meet("nowhere.invalid:1234", 2, 1, 1)
    with several_processes.socket.create_server(("", 0)) as taken:
        with pytest.raises(InputError, match="cannot listen at port"):
            rendezvous.meet(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0, 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tiny.write_world(tmp_path_factory.mktemp("world"))
    tiny.write_data(root / "pairs", tiny.preferences(7))
    return root


PAIRS = {"loss": "dpo", "beta": 0.5, "alpha": 16.0, "dropout": 0.0}
BABBLE = ("--prompt", "The fox", "--max-tokens", 12)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """With a run of another model in ``other``."""
    folder = tmp_path_factory.mktemp("out")
    (folder / "other" / "checkpoints" / "1").mkdir(parents=True)
    (folder / "other" / "settings.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def ended(world, out):
    """Commands of two processes, one after the other: to start the processes takes longer than what they do."""

    def typed(name, mesh, **changes):
        options = tiny.lora(world, out / name, iters=2, **changes)
        return ["minicpm_jax.lora", *tiny.flags(options), "--mesh", mesh]

    commands = {
        "batches": typed("none", "fsdp=4", batch_size=3),
        "seeds": typed("none", "tensor=4"),
        "pairs": typed("pairs", "fsdp=2,tensor=2", data=world / "pairs", **PAIRS),
        "answer": ["minicpm_jax.generate", "--model", world / "model", *BABBLE, "--mesh", "tensor=2,fsdp=2"],
        "other": typed("other", "tensor=4", resume=True),
    }
    return several_processes.in_turn(commands, {"seeds": [["--seed", "1"], ["--seed", "2"]]})


def test_pairs_in_two_processes_are_those_of_one(world, out, ended, tmp_path):
    """The chosen answers of a batch lie with one process, the rejected ones with the other. Measured: within 1e-7."""
    tiny.finetune("minicpm_jax", tiny.lora(world, tmp_path, iters=2, data=world / "pairs", **PAIRS))
    first, second = ended["pairs"]
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert second.stdout == "" and first.stdout.count("Iter 2: ") == 1
    records = [tiny.records(folder) for folder in (tmp_path, out / "pairs")]
    for name in ("loss", "gradient_norm", "margin"):
        np.testing.assert_allclose(*([record[name] for record in of] for of in records), rtol=1e-5, atol=1e-6)
    config = open_checkpoint(world / "model").config
    tiny.same_adapters(*(read_adapter(folder, config) for folder in (out / "pairs", tmp_path)), 1e-3)


def test_what_cannot_be_is_said_in_each_process(out, ended):
    """And by all of them where only the first looks: into the run's folder."""
    for process in ended["batches"]:
        assert process.returncode == 2
        said = process.stderr.splitlines()  # gloo tells of its connections
        assert [line for line in said if not line.startswith("[Gloo]") and not line.endswith(" ..")] == [
            "error: --batch-size 3 does not divide over the 4 devices of fsdp."
        ]
    for process in ended["seeds"]:
        assert process.returncode == 2 and "process 1 has other options, another model or other data" in process.stderr
    assert not (out / "none").exists()
    for process in ended["other"]:
        assert process.returncode == 2 and "other holds a run with another model, " in process.stderr


def test_an_answer_of_two_processes_is_that_of_one(world, ended):
    expected = typed("minicpm_jax.generate", "--model", world / "model", *BABBLE)
    first, second = ended["answer"]
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == expected.stdout != "" and second.stdout == ""
    assert "tokens-per-sec" in first.stderr and "tokens-per-sec" not in second.stderr


READING = """
import collections, json, sys
import tyro
from minicpm_jax.options import Placement
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
from minicpm_jax.training.step import weights_of
model, _ = load(sys.argv[1], mesh=mesh)
held = sum(max(s.data.nbytes for s in w.addressable_shards) for w in weights_of(model).values())
print(json.dumps([sum(read.values()), held]), file=sys.stderr)
"""


def test_columns_are_read_without_what_lies_between_them(tmp_path, monkeypatch):
    numbers = np.arange(12 * 1024, dtype=np.float32).reshape(12, 1024)
    numbers.tofile(tmp_path / "numbers")
    tensor = FileTensor(tmp_path / "numbers", 0, numbers.dtype, numbers.shape, (1024, 1))
    read, original = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *call: read.append(original(*call)) or read[-1])
    here = (slice(3, 9), slice(512, 1024))
    np.testing.assert_array_equal(tensor.read(here), numbers[here])
    assert sum(map(len, read)) == 6 * 512 * 4
    (tmp_path / "numbers").write_bytes(b"short")
    with pytest.raises(InputError, match="numbers became shorter while it was read; load it again"):
        tensor.read(here)


def test_each_process_reads_what_its_devices_hold(world):
    """Rows and columns of the files: half of them each, where one axis of the mesh lies over both processes; and all
    norms. These find each other by themselves, as they do on Cloud TPU."""
    checkpoint = open_checkpoint(world / "model")
    norms = sum(tensor.read().nbytes for name, tensor in checkpoint.tensors.items() if "norm" in name)
    for process in several_processes.run("-c", READING, world / "model", "--mesh", "fsdp=2,data=2", mpi=True):
        assert process.returncode == 0, process.stderr
        read, held = json.loads(process.stderr.splitlines()[-1])
        assert read == held == (checkpoint.nbytes + norms) // 2
