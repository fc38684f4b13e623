"""The benchmarks run; what they measure is in docs/benchmarks.md."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.benchmark


def run(name, *arguments):
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("backend", ["jax", "mlx"])
@pytest.mark.parametrize("part", [[], ["--whole-step"]])
def test_skipping_rows_gives_what_the_dense_mlp_gives(backend, part):
    """The command compares them itself."""
    ran = run("sparse_down", "--backend", backend, "--layers", "1", "--rounds", "1", "--sparsity", "0.9", *part)
    assert ran.returncode == 0, ran.stderr
    variants = [line.split(" | ")[1].split()[0] for line in ran.stdout.splitlines()[2:]]
    assert variants == ["dense", "down", "down", "up+down", "up+down"]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_memory_of_a_prompt_is_more_than_its_cache():
    ran = run("prompt_memory", "--tokens", "32")
    assert ran.returncode == 0, ran.stderr
    tokens, cache, held, *_ = ran.stdout.splitlines()[2].strip("| ").split(" | ")
    assert (tokens, cache) == ("32", "2 MB") and int(held.split()[0]) >= 2


def test_the_loss_in_chunks_is_the_plain_one():
    """The command compares them itself."""
    ran = run("training", "--part", "loss", "--backend", "mlx", "--rows", "1", "--tokens", "64", "--logits", "262144")
    assert ran.returncode == 0, ran.stderr
    chunked, whole = (line.split(" | ") for line in ran.stdout.splitlines()[2:])
    assert chunked[0] == "| in chunks" and int(chunked[2].split()[0]) < int(whole[2].split()[0])


@pytest.mark.tpu
def test_a_step_is_compiled_for_a_tpu():
    ran = run("training", "--part", "loss", "--model", "pico", "--rows", "1", "--tokens", "32", "--logits", "4096")
    assert ran.returncode == 0, ran.stderr
    assert [line.split(" | ")[0] for line in ran.stdout.splitlines()[2:]] == ["| in chunks", "| plain"]


def test_mlx_lm_trains_one_padding_token_a_row_and_ours_none():
    ran = run("lora_peer", "--rounds", "1", "--rows", "1", "--examples", "2", "--tokens", "64")
    assert ran.returncode == 0, ran.stderr
    rows = {cells[0].strip("| "): cells for cells in (line.split(" | ") for line in ran.stdout.splitlines()[2:])}
    targets = {name: [int(n) for n in cells[3].split(", ")] for name, cells in rows.items()}
    assert list(targets) == ["ours", "ours, compiled", "ours, packed", "mlx_lm"]
    assert targets["ours"][1] == 0 and targets["mlx_lm"] == [targets["ours"][0] + 2, 2]


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_packed_rows_hold_less_padding(backend):
    arguments = ["--backend", backend, "--rows", "2", "--examples", "12", "--tokens", "64", "--rounds", "1"]
    ran = run("training", "--part", "packing", *arguments)
    assert ran.returncode == 0, ran.stderr
    apart, packed = (int(line.split(" | ")[2].split()[-1].removesuffix("%")) for line in ran.stdout.splitlines()[2:])
    assert packed < apart


@pytest.mark.parametrize(
    ("name", "more", "first"),
    [
        ("speculation", ["--draft-layers", "1", "--num-draft-tokens", "2"], ["copies itself", "free"]),
        ("concurrency", ["--prompt", "9", "--at-once", "1", "2"], ["1", "2"]),
    ],
)
def test_every_way_gives_the_same_tokens(name, more, first):
    """The commands compare them themselves."""
    ran = run(name, "--layers", "1", "--words", "64", "--tokens", "4", "--rounds", "1", *more)
    assert ran.returncode == 0, ran.stderr
    assert sorted({line.split(" | ")[0].strip("| ") for line in ran.stdout.splitlines()[2:]}) == first


def test_a_stream_is_measured_while_strangers_ask():
    ran = run("stall", "--layers", "1", "--words", "64", "--prompts", "40", "--quiet", "0.5")
    assert ran.returncode == 0, ran.stderr
    rows = [line.split(" | ")[0].strip("| ") for line in ran.stdout.splitlines() if line.startswith("| ")]
    assert rows[:3] == ["stranger", "nobody", "a prompt of 40 tokens"] and "checksum" in ran.stdout


def test_a_python_without_the_peer_is_told():
    ran = run("tunix_peer", "--peer-python", sys.executable)
    assert ran.returncode == 2
    assert (
        ran.stderr.strip() == f"error: --peer-python {sys.executable} lacks google-tunix or libtpu; install both there."
    )
