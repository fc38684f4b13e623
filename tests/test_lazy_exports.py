"""Names of a package that are imported on first use, each tried in an interpreter that has imported nothing yet."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What a user writes, and the types that a checker sees there; it is checked once for each backend.
TYPED = """
from collections.abc import Iterator
from typing import assert_type

import {package}.generate
from {package} import Model, activation_sparsity, batch_generate, chat, generate, load, stream_generate
from {package}.generate import stream_generate as of_the_module
from minicpm_data import Response, Tokenizer

model, tokenizer = load("minicpm-2b", dtype="bfloat16")
assert_type(load(), tuple[Model, Tokenizer | None])
assert_type(generate(model, tokenizer, "Hello"), str)
assert_type({package}.generate(model, tokenizer, [1, 2], max_tokens=3), str)
assert_type(stream_generate(model, tokenizer, "Hello"), Iterator[Response])
assert_type(of_the_module(model, tokenizer, "Hello"), Iterator[Response])
assert_type(batch_generate(model, tokenizer, ["Hello"]), list[list[Response]])
assert tokenizer is not None
assert_type(chat(model, tokenizer, "Hello")[0], str)
assert_type(tokenizer.encode("Hello"), list[int])
activation_sparsity(model, [1, 2]).mean()
"""
WRONG = """
from {package} import generate, load, nonsense  # fault: attr-defined

model, tokenizer = load("a folder")
generate(None, tokenizer, "a prompt")  # fault: arg-type
generate(model, tokenizer, 5)  # fault: arg-type
"""


@pytest.mark.parametrize(
    "statement",
    [
        "from minicpm_data import tokenizer; assert tokenizer.__name__ == 'minicpm_data.tokenizer'",
        "import minicpm_data.tokenizer.tokenizer; assert callable(minicpm_data.load_tokenizer)",
        "from minicpm_data import Tokenizer; assert Tokenizer.__module__ == 'minicpm_data.tokenizer.tokenizer'",
        "from minicpm_data import *; assert callable(stream_text) and callable(load_tokenizer)",
        "import minicpm_data; assert not hasattr(minicpm_data, 'nonsense')",
        "import minicpm_data; assert 'load_tokenizer' in dir(minicpm_data)",
        "import sys, minicpm_data; assert 'minicpm_data.tokenizer.tokenizer' not in sys.modules",
        # The module of the command must not take the place of the function of its name.
        "import minicpm_jax.generate, minicpm_jax; assert callable(minicpm_jax.generate)",
        "from minicpm_jax.generate import Options, generate; import minicpm_jax as p; assert p.generate == generate",
    ],
)
def test_in_a_fresh_interpreter(statement):
    run = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("package", ["minicpm_data", "minicpm_jax", "minicpm_mlx"])
def test_a_type_checker_sees_the_names_that_there_are(package):
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    [typed] = [n.body for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    names = [(a.asname, getattr(importlib.import_module(n.module), a.name)) for n in typed for a in n.names]
    assert dict(names) == {name: getattr(module, name) for name in module.__all__}


@pytest.mark.slow  # a type checker reads all packages
def test_a_users_file_type_checks(tmp_path):
    expected = []
    for package in ("minicpm_jax", "minicpm_mlx"):
        (tmp_path / f"uses_{package}.py").write_text(TYPED.format(package=package))
        wrong = tmp_path / f"misuses_{package}.py"
        wrong.write_text(WRONG.format(package=package))
        lines = wrong.read_text().splitlines()
        expected += [
            (wrong.name, i + 1, line.split("# fault: ")[1]) for i, line in enumerate(lines) if "# fault: " in line
        ]
    # With the options of `make lint`, whose cache then serves.
    command = [sys.executable, "-m", "mypy", *map(str, sorted(tmp_path.glob("*.py")))]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    faults = [line for line in run.stdout.splitlines() if ": error: " in line]
    found = [(Path(f.split(":")[0]).name, int(f.split(":")[1]), f.rpartition("[")[2].rstrip("]")) for f in faults]
    assert sorted(found) == sorted(expected), run.stdout + run.stderr
    for package in ("weights_io", "minicpm_data", "minicpm_jax", "minicpm_mlx", "minicpm_serve"):
        assert (ROOT / package / "py.typed").is_file()  # without it a checker looks into no installed package
