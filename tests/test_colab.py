"""The notebooks in copies of Colab's TPU runtime, whose JAX is too old for this package: `make test-colab`.

A kernel has what Colab has (`reference/colab-tpu.txt`), a folder with nothing in it, and a wheel or a clone in SOURCE.
The first cells are those of the notebooks, and so is what pip then installs; only the TPU is a CPU.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_notebooks import ROOT, RUNS, execute, nbclient

pytestmark = pytest.mark.colab

FIRST, *OTHERS = [run for run in RUNS if run.notebook != "mac_mlx"]
UPGRADED = ("jax", "jaxlib", "libtpu", "flax")
LISTED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "tests/reference/colab-tpu.txt").read_text("utf-8"), re.M))


def versions(python):
    text = subprocess.check_output([python, "-m", "pip", "list", "--format=json"], stderr=subprocess.DEVNULL)
    return {each["name"]: each["version"] for each in json.loads(text)}


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """``runtime()`` is a copy of Colab's environment, made anew: its Python."""
    assert LISTED.items() <= versions(sys.executable).items(), "run it by `make test-colab`"

    def make():
        folder = shutil.copytree(sys.prefix, tmp_path_factory.mktemp("colab") / "environment", symlinks=True)
        return folder / "bin" / "python"

    return make


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    config = folder / "build.cfg"  # nothing is written into the clone
    config.write_text(f"[build]\nbuild_base = {folder}\n[egg_info]\negg_base = {folder}\n")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, env=os.environ | {"DIST_EXTRA_CONFIG": str(config)}, check=True)
    (found,) = folder.glob("*.whl")
    return found


def run_in(python, run, source, folder, before=""):
    """What `execute` gives, with kernels of that Python."""
    specification = {"argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}
    kernel = python.parent.parent / "share" / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True, exist_ok=True)
    (kernel / "kernel.json").write_text(json.dumps(specification | {"display_name": "colab"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(python.parent.parent / "share" / "jupyter"))
        patch.delenv("PYTHONPATH", raising=False)  # which would import a clone
        patch.setenv("MINICPM_NOTEBOOK_CPU", "1")
        return execute(run.notebook, run.variables | {"SOURCE": str(source)}, folder, before, "colab", 900)


@pytest.fixture(scope="module")
def upgraded(runtime, wheel, tmp_path_factory):
    """A runtime in which the first notebook has run whole; what that printed, and the folder where it ran."""
    python, folder = runtime(), tmp_path_factory.mktemp("content")
    return python, run_in(python, FIRST, wheel, folder)[0], folder


def test_the_first_cell_upgrades_jax_and_keeps_the_rest(upgraded):
    python, printed, folder = upgraded
    for expected in FIRST.printed:
        assert re.search(expected, printed), (expected, printed)
    (line,) = [line for line in printed.splitlines() if f"jax {LISTED['jax']} -> " in line]
    now = versions(python)
    for name in UPGRADED:
        assert f"{name} {LISTED[name]} -> {now[name]}" in line and now[name] != LISTED[name]
    moved = {name for name, version in LISTED.items() if now[name] != version}
    assert moved == {*UPGRADED, "huggingface_hub"}, "of what is imported by a kernel or rests on numpy, nothing"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("run", OTHERS, ids=lambda run: f"{run.notebook}-{Path(str(run.variables.get('MODEL'))).name}")
def test_the_others_run_whole(run, upgraded, wheel, tmp_path):
    """And install nothing again."""
    printed, outputs = run_in(upgraded[0], run, wheel, tmp_path)
    assert "Installing" not in printed
    for expected in run.printed:
        if "dense_1b" not in expected:  # which lies in a clone
            assert re.search(expected, printed), (expected, printed)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == run.pictures


@pytest.mark.parametrize(
    ("job", "least", "most"),
    [
        (("generate", "--max-seq-length", "4096"), 6.95e9, 6.97e9),
        (("prefill", "--max-seq-length", "4096"), 6.95e9, 6.99e9),
        (
            ("lora", "--max-seq-length", "512", "--batch-size", "1"),
            5.5e9,
            9e9,
        ),  # measured: 8.77e9, with libtpu 0.0.52 8.39e9
    ],
)
def test_the_libtpu_that_came_compiles(job, least, most, upgraded):
    """MiniCPM-2B for one v5e, and its text is counted."""
    command = [upgraded[0], "-m", "minicpm_jax.fit", "--topology", "v5e:1x1", "--json", "--job", *job]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=upgraded[2])
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["fits"] and least < found["needed"] < most
    assert found["hbm_traffic"] > 5e9


def test_a_restart_is_asked_for_where_jax_was_imported(runtime, tmp_path):
    """In a sentence; numpy stays. In the next kernel all is there. From a clone."""
    python = runtime()
    with pytest.raises(nbclient.exceptions.CellExecutionError) as stopped:
        run_in(python, FIRST, ROOT, tmp_path, before="import jax, jax.numpy, numpy")
    said = str(stopped.value)
    assert re.search(r"error: .*\bjax, jaxlib, libtpu .*restart the runtime", said) and "Traceback" not in said
    assert versions(python)["numpy"] == LISTED["numpy"]
    printed, _ = run_in(python, FIRST, ROOT, tmp_path)
    assert "Installing" not in printed
