"""What each package needs, and what it says where that is missing."""

import ast
import re
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
# The one table of what is started by its name (commands of weights_io that need a tokenizer, commands of a backend that
# minicpm_serve runs, the packages of the console scripts), and a name that is data.
EXCEPTIONS = {
    *(("weights_io/command_line.py", f"minicpm_{name}") for name in ("data", "jax", "mlx", "serve")),
    ("minicpm_data/training/run_folder.py", "minicpm_jax"),  # a value in run folders of earlier versions; no import
}
BY_STRING = ("find_spec", "import_module", "__import__", "run_module", "run_path")
# Calls of those whose module is no string in the source.
BY_VARIABLE = {
    "weights_io/command_line.py": ["ABOVE[name]", "ABOVE[name]", "package"],  # the table; what __main__.py says it is
    "weights_io/cli/help_page.py": ["module"],  # found, not imported: its docstring holds the examples
    "weights_io/cli/launcher.py": ["f'{package}.{name}'"],  # a command of that package, by the name that was typed
    "weights_io/lazy_exports.py": ["f'{package}.{exports[name]}'"],  # of the package that installs it
    "minicpm_data/metrics.py": ["PACKAGES[report_to]"],  # wandb or tensorboard
    "minicpm_data/cli/notebook.py": ["module"],  # what the notebook runs
    "minicpm_serve/backends.py": ["name", "package"],  # of the two backends; what they need
}


def named(path: Path) -> set[str]:
    """Top-level packages that a file imports, also within its functions, or names as modules in its strings."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"\w+(\.\w+)*\.?", node.value):
                found |= {node.value.split(".")[0]} & ABOVE.keys()
        elif isinstance(node, ast.Call) and called(node) in BY_STRING and isinstance(node.args[0], ast.Constant):
            found.add(node.args[0].value.split(".")[0])
    return found


def called(node: ast.Call) -> str:
    return ast.unparse(node.func).rpartition(".")[2]


@pytest.mark.parametrize("package", ABOVE)
def test_imports_run_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {(str(path.relative_to(ROOT)), name) for path in files for name in named(path)}
    wrong = {(path, name) for path, name in wrong if name in ABOVE[package] | NEVER}
    ours = {(path, name) for path, name in EXCEPTIONS if path.startswith(f"{package}/")}
    assert wrong == ours


def test_what_is_imported_by_a_variable_is_known():
    """What minicpm_data needs of a backend is handed to it."""
    found = {}
    for path in sorted(path for package in ABOVE for path in (ROOT / package).rglob("*.py")):
        calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
        given = [n.args[0] for n in calls if called(n) in BY_STRING]
        if names := sorted(ast.unparse(arg) for arg in given if not isinstance(arg, ast.Constant)):
            found[str(path.relative_to(ROOT))] = names
    assert found == BY_VARIABLE


def test_the_table_of_commands_starts_nothing_else():
    from weights_io.command_line import ABOVE as table

    for name, module in table.items():
        below = ["weights_io"] if module == f"minicpm_data.cli.{name}" else ["minicpm_jax", "minicpm_mlx"]
        assert below == ["weights_io"] or module.startswith("minicpm_serve.")
        assert all((ROOT / package / f"{name}.py").is_file() for package in below)
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_the_console_scripts_are_those_of_the_table():
    from weights_io.command_line import SCRIPTS

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert scripts == dict.fromkeys(SCRIPTS, "weights_io.cli.launcher:script")
    assert all((ROOT / package / "__main__.py").is_file() for package in SCRIPTS.values())


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


def test_the_tables_of_the_architecture_name_every_room():
    packages = {"data": "minicpm_data", "JAX": "minicpm_jax", "MLX": "minicpm_mlx", "serve": "minicpm_serve"}
    named = set()
    for row in re.findall(r"^\| (`.*?) \| (.*?) \|", (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.M):
        folders = [cell.strip("`/") for cell in row[0].split(", ")]
        within = [] if folders[0] in ABOVE else [packages.get(name, name) for name in row[1].split(", ")]
        named |= {f"{package}/{folder}" for package in within for folder in folders} or set(folders)
    there = {path.parent.relative_to(ROOT).as_posix() for name in ABOVE for path in (ROOT / name).rglob("__init__.py")}
    assert named == there


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
