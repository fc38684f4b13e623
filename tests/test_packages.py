"""What each package needs, and what it says where that is missing."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
# Imports run one way.
ABOVE = {
    "weights_io": {"minicpm_data", "minicpm_jax", "minicpm_mlx", "minicpm_serve", "jax", "flax", "mlx", "mlx_lm"},
    "minicpm_data": {"minicpm_jax", "minicpm_mlx", "minicpm_serve", "jax", "flax", "mlx", "mlx_lm"},
    "minicpm_jax": {"minicpm_mlx", "minicpm_serve", "mlx", "mlx_lm"},
    "minicpm_mlx": {"minicpm_jax", "minicpm_serve", "jax", "flax"},
    "minicpm_serve": {"minicpm_jax", "minicpm_mlx", "jax", "flax", "mlx", "mlx_lm"},  # the backends by name alone
}
NEVER = {"torch", "transformers", "peft"}  # only mlx-lm brings them along
# convert writes the tokenizer that a GGUF file carries; inspect refuses the tokenizers that a loader refuses.
EXCEPTIONS = {("weights_io/convert.py", "minicpm_data"), ("weights_io/inspect.py", "minicpm_data")}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, also within its functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ABOVE)
def test_imports_run_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {(str(path.relative_to(ROOT)), name) for path in files for name in imported(path)}
    wrong = {(path, name) for path, name in wrong if name in ABOVE[package] | NEVER}
    assert wrong - EXCEPTIONS == set()


def imports() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, also in its functions and for types. Those of an ``__init__.py`` are
    left out: it names what is in its folder."""
    files = {}
    for package in ABOVE:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    def owner(name: str) -> str:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name

    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                named = [f"{node.module}.{alias.name}" for alias in node.names]
            owners = {owner(each) for each in named} - {"", name}
            found[name] |= {each for each in owners if files[each].name != "__init__.py"}
    return found


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The first circle that is found, as a way from a node back to itself; [] where there is none."""
    done: set[str] = set()

    def follow(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for following in sorted(arrows.get(node, ())):
            if found := follow(following, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(arrows) if (found := follow(node, []))), [])


def test_no_file_imports_itself_in_a_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle(imports()) == []


def test_no_folder_imports_itself_in_a_circle():
    """Folders within a package; a package's own folder stands in front of them."""
    folders: dict[str, set[str]] = {}
    for name, arrows in imports().items():
        if name.count(".") < 2:
            continue
        own = name.rpartition(".")[0]
        over = {each.rpartition(".")[0] for each in arrows if each.count(".") >= 2}
        folders[own] = folders.get(own, set()) | over - {own}
    assert circle(folders) == []


def test_no_folder_is_full():
    for folder in {path.parent for package in ABOVE for path in (ROOT / package).rglob("*.py")}:
        assert len(list(folder.glob("*.py"))) <= 27, folder


def test_minicpm_data_imports_nothing_by_a_name_in_a_string():
    """What it needs of a backend is handed to it."""
    calls = [
        f"{path.name}:{node.lineno}"
        for path in sorted((ROOT / "minicpm_data").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__")
    ]
    assert calls == []


def alone(statement: str) -> str:
    """The last line that an interpreter without any installed package prints."""
    run = subprocess.run([sys.executable, "-S", "-c", statement], capture_output=True, text=True, cwd=ROOT)
    return (run.stderr + run.stdout).splitlines()[-1]


def test_without_jax_the_package_names_the_extra():
    expected = "ImportError: minicpm_jax needs JAX and Flax: pip install 'minicpm-jax-mlx[jax]' (on a TPU: [tpu])."
    assert alone("import minicpm_jax") == expected


def test_with_jax_but_not_flax_the_package_names_the_extra():
    hide = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: n == 'jax' or find(n); "
    assert alone(hide + "import minicpm_jax").startswith("ImportError: minicpm_jax needs JAX and Flax: pip install")


def test_without_mlx_the_package_names_the_extra():
    expected = "ImportError: minicpm_mlx needs MLX: pip install 'minicpm-jax-mlx[mlx]'."
    assert alone("import minicpm_mlx") == expected


def test_the_lowest_versions_are_those_that_are_tested():
    """`make test-lowest` installs just what pyproject.toml admits, of all that it installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = ("jax", "fit", "mlx", "serve", "notebooks", "test")
    needed = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    lowest = {}
    for requirement in map(Requirement, (text for texts in needed for text in texts)):
        if requirement.specifier:
            (bound,) = requirement.specifier
            assert bound.operator == ">=", requirement
            lowest[requirement.name] = Version(bound.version)
    lines = (ROOT / ".ci" / "lowest.txt").read_text("utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert lowest.keys() - tested.keys() == {"ruff", "mypy"}
    assert {name: Version(version) for name, version in tested.items()} == {name: lowest[name] for name in tested}
