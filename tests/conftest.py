"""Settings that must be in the environment before jax is imported, and the reference files."""

import gc
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices for the sharding tests; work that names no device stays on the first.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Most of the suite's time is compilation, which these flags make three times shorter: nothing is optimised.
    flags = "--xla_force_host_platform_device_count=8"
    flags += " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    # A device that waits 40 s for the others ends the process: on busy cores they may well take longer.
    flags += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
# Programs compiled once per user and machine, not once per run; commands that tests start find them too, and so do the
# other workers of pytest-xdist. JAX compiles again, with a warning, what it finds half-written.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"minicpm-test-cache-{os.getuid()}")
)
# The small programs too: thousands that many modules share (27 ms of CPU time each, read from the cache 12).
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if find_spec("jax") is not None and version("jax").startswith("0.10."):
    # Most of what is left. Later releases cannot do without these emitters; nor does libtpu know the flag, at which it
    # would end the process: it is there while the CPU's compiler reads its flags, and no longer.
    known = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    import jax

    jax.devices()
    os.environ["XLA_FLAGS"] = known


# `make test-quick`: of these files (or tests, whose names begin so) what is not slow. They prove an environment and
# most changes: the files' readers, configs, loading, generating, training and serving in both backends.
QUICK = tuple(
    f"tests/test_{name}"
    for name in """
    adapters.py answers.py batches.py checkpoint.py compiled_step.py config.py config_file.py config_of_mlp.py
    convert.py docs.py examples.py files_folder.py files_gguf.py files_safetensors.py files_torch_pickle.py formats.py
    fuse.py generate.py json_text.py lazy_exports.py lora.py openai_api.py packages.py pico.py streaming.py tokenizer.py
    upcycle.py variant.py write.py commands.py::test_chat commands.py::test_generate
    readme.py::test_the_readmes readme.py::test_what_is_made
    """.split()
)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    if gone := [name for name in QUICK if not (config.rootpath / name.partition("::")[0]).exists()]:
        raise pytest.UsageError(f"{', '.join(gone[:3])}: no such file; QUICK of tests/conftest.py names it.")
    others = ("slow", "interop", "tpu", "benchmark", "fuzz", "colab", "notebook")
    for item in items:
        if item.nodeid.startswith(QUICK) and not any(map(item.get_closest_marker, others)):
            item.add_marker("quick")


def pytest_addoption(parser):
    group = parser.getgroup("fuzz", "broken files and requests (-m fuzz)")
    group.addoption("--mutants", type=int, default=200, help="how many, over all readers (2000 is all of a seed)")
    group.addoption("--fuzz-seed", type=int, default=0, help="another number gives other mutants")
    group.addoption("--mutant", metavar="READER:NUMBER", help="this one alone")


def pytest_runtest_setup(item):
    if (mark := item.get_closest_marker("tpu")) is None:
        return
    if find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed (it exists for Linux on x86-64)")
    if (since := mark.kwargs.get("since")) and Version(version("libtpu")) < Version(since):
        pytest.skip(f"libtpu {version('libtpu')} is here, and what is measured holds since {since}")


def pytest_collection_finish(session):
    """What was imported stays: the collector needs not look at it again, and seldom at what tracing makes."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def no_programs_of_other_modules():
    """Each compiled program is mapped into memory; thousands of them are more than a process may have (65,530 maps),
    and XLA then crashes. Nor does a module meet what another one compiled while it had replaced a function."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Path]:
    """``reference("text/minicpm")`` is the folder or file of that name under tests/reference."""
    root = Path(__file__).parent / "reference"

    def find(name: str) -> Path:
        path = root / name
        assert path.exists(), f"tests/reference/{name} is missing"
        return path

    return find
