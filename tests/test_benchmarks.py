"""The benchmarks run; what they measure is in docs/benchmarks.md."""

import subprocess
import sys

import pytest


def run(name, *arguments):
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "mlx"])
@pytest.mark.parametrize("part", [[], ["--whole-step"]])
def test_skipping_rows_gives_what_the_dense_mlp_gives(backend, part):
    """The command compares them itself."""
    ran = run("sparse_down", "--backend", backend, "--layers", "1", "--rounds", "1", "--sparsity", "0.9", *part)
    assert ran.returncode == 0, ran.stderr
    variants = [line.split(" | ")[1].split()[0] for line in ran.stdout.splitlines()[2:]]
    assert variants == ["dense", "down", "down", "up+down", "up+down"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_memory_of_a_prompt_is_more_than_its_cache():
    ran = run("prompt_memory", "--tokens", "32")
    assert ran.returncode == 0, ran.stderr
    tokens, cache, held, *_ = ran.stdout.splitlines()[2].strip("| ").split(" | ")
    assert (tokens, cache) == ("32", "2 MB") and int(held.split()[0]) >= 2
