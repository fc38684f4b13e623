"""Every command block of docs/, run from top to bottom of its page in one folder, and every block of Python.

All as it stands, but for what would be downloaded or take long: the built-in model stands for those named, and runs are
short.
"""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny_adapter
import tiny_model
import tyro
from documented_commands import ROOT, blocks, commands, run, served
from PIL import Image

import minicpm_jax
from minicpm_data.cli.generate_options import GenerateOptions
from minicpm_serve import openai_api
from weights_io import catalog
from weights_io.adapters import save_adapter
from weights_io.checkpoint import open_checkpoint

MEASURED = ("measured.md", "fit.md", "benchmarks.md", "throughput.md", "loading.md", "tunix.md")
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in MEASURED)
ELSEWHERE = ("serve.md", "pico.md")  # by the test of the server below, and by tests/test_pico.py
RELEASED = r"minicpm(?:-(?:2b|1b|2b-128k)|3-4b|4-0.5b|5-1b)"
PAGE_URL = "http://127.0.0.1:8000/v1"
SEEING = str(ROOT / "tests" / "reference" / "vision" / "v2")
SHORTER = {
    r"--model minicpm-v-2": f"--model {SEEING} --max-tokens 8",
    r"(?<![\w/])tests/reference/vision/v2": SEEING,
    r"--model minicpm5-1b (.*--thinking-budget) \d+( --max-tokens \d+)?": r"--model thinker \1 8 --max-tokens 24",
    rf"--(model|hf-path) {RELEASED}(?= |$)": r"--\1 pico",
    r"(\.benchmark --model \S+) .*": r"\1 -p 8 -g 2 -n 1",
    r"(\.perplexity .*)": r"\1 --sequence-length 32 --num-samples 2",
    r"--iters 800": "--iters 3",  # resumes
    r"--iters \d{3,}": "--iters 2",
    r"^((?!.*pretrain).*--iters .*)": r"\1 --val-batches 1",
    r"(--test\b.*)": r"\1 --test-batches 1",
    r"--iters \d+ --decay-steps \d+": "--iters 3 --warmup-steps 1 --decay-steps 1",
    r"(minicpm_\w+.pretrain .*--batch-size) 8": r"\1 2 --max-seq-length 32",
    r"--from-step \d+": "--from-step 2",
    r"--documents \d+": "--documents 2400",
    r"(\.evaluate .*--limit) \d+": r"\1 4 --max-tokens 4",
    r"--model minicpm-2b-history --revisions (.*--limit) \d+": r"--model saved --folders \1 4",
    r"(?<=lora|tune)( .*) --batch-size (?:[48]|\d\d)(?= |$)": r"\1 --batch-size 2",
    r"(\.(?:lora|finetune) .*) --max-seq-length \d+": r"\1",
    r"(minicpm_\w+\.(?:lora|finetune) .*)": r"\1 --max-seq-length 64",
    r"(minicpm_serve.longcontext .*--max-seq-length) \d+": r"\1 200 --num-samples 1",
    r"(minicpm_serve.longcontext .*--lengths) [\d ]+--num-samples \d+": r"\1 200 300 --num-samples 1",
    r"(\.evaluate .*--adapter-path) adapters": r"\1 adapters-of-others",
    r"(minicpm_jax.fit .*--max-seq-length) \d+": r"\1 64",
}


def shortened(command):
    for long, short in SHORTER.items():
        command = re.sub(long, short, command)
    return command


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What the pages expect a user to have."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "data").mkdir()
    for split in ("train", "valid", "test"):
        row = {"prompt": "1 + 1 = ?", "completion": "1 + 1 = 2, so the answer is 2."}
        (folder / "data" / f"{split}.jsonl").write_text(32 * (json.dumps(row) + "\n"), encoding="utf-8")
    (folder / "prompts.txt").write_text("12 + 7 = ?\n3 + 4 = ?\n")
    (folder / "lora.yaml").write_text(
        "data: data\nbatch_size: 4\nlora_parameters: {rank: 4, scale: 2.0, dropout: 0.0}\n"
    )
    shutil.copy(ROOT / "weights_io" / "pico" / "config.json", folder)
    for name in ("cat.jpg", "dog.png"):
        Image.effect_noise((60, 40), 90).save(folder / name)
    checkpoint = open_checkpoint(ROOT / "weights_io" / "pico")
    shutil.copytree(ROOT / "weights_io" / "pico", folder / "thinker")
    shutil.copy(ROOT / "tests" / "reference" / "chat" / "minicpm5_1b" / "chat_template.jinja", folder / "thinker")
    save_adapter(folder / "adapters-of-others", tiny_adapter.make(checkpoint), checkpoint.config)
    (folder / "saved").mkdir()  # stand for the revisions of a repository
    for step in ("step10000", "step20000"):
        tiny_model.write(folder / step).rename(folder / "saved" / step)
    ids = np.arange(3, 19)[None]
    np.savez(folder / "reference.npz", input_ids=ids, logits=np.asarray(minicpm_jax.load()[0](ids)))
    return folder


@pytest.fixture
def folder(given, tmp_path):
    return shutil.copytree(given, tmp_path, dirs_exist_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(f"docs/{page}") and page not in ELSEWHERE])
def test_commands(page, folder, monkeypatch, capsys):
    for command in commands(f"docs/{page}"):
        run(shortened(command), folder, monkeypatch)
        said = capsys.readouterr()
        assert said.out.strip() or said.err.strip(), command


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(f"docs/{page}", "python") and page != "serve.md"])
def test_python(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for block in blocks(f"docs/{page}", "python"):
        exec(re.sub(f'"{RELEASED}"', '"pico"', block).replace("minicpm-v-2", SEEING), {})


def test_services_start_the_server_with_flags_that_there_are():
    """Of the systemd unit and of the Dockerfile."""
    (unit,), (image,) = blocks("docs/serve.md", "ini"), blocks("docs/serve.md", "dockerfile")
    line = re.search(r"^ExecStart=\S+/python -m minicpm_serve\.openai_api (.*)$", unit, re.MULTILINE)
    entry, command = (
        json.loads(re.search(rf"^{word} (\[.*\])$", image, re.MULTILINE)[1]) for word in ("ENTRYPOINT", "CMD")
    )
    assert line is not None and entry[:3] == ["python", "-m", "minicpm_serve.openai_api"]
    for arguments in (shlex.split(line[1]), [*entry[3:], *command]):
        options = tyro.cli(openai_api.Options, args=arguments)
        assert options.backend == "jax" and catalog.find(options.model) is not None


@pytest.mark.slow
def test_what_the_page_of_the_server_asks_it(folder, capsys):
    (command,), (python, _) = commands("docs/serve.md"), blocks("docs/serve.md", "python")  # tools: test_tool_api.py
    (curl,) = [block for block in blocks("docs/serve.md", "bash") if block.startswith("curl")]
    with served(shortened(command), folder) as url:
        asked = subprocess.run(["bash", "-ec", curl.replace(PAGE_URL, url)], capture_output=True, text=True)
        exec(python.replace(PAGE_URL, url), {})
    assert '"content":"12 + 7 = 19"' in asked.stdout and asked.stdout.endswith("[DONE]\n\n"), asked
    assert re.fullmatch(r"12 \+ 30 = 42 \d+\n12 \+ 30 = 42", capsys.readouterr().out)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", *(f"docs/{page}" for page in PAGES)])
def test_a_sentence_shows_no_command_that_is_not_run(page):
    """A command with options stands in a block, which is run, and not in a sentence."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    run_by_others = "".join(catalog.how_to_run())
    for command in re.findall(r"`python -m ([^`]*)`", text):
        if f"python -m {command}" not in commands(page) and f"`python -m {command}`" not in run_by_others:
            assert importlib.util.find_spec(command.removeprefix("pydoc ")), command


def test_commands_name_the_extras_that_there_are():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shown = [e for page in PAGES for block in blocks(f"docs/{page}", "bash") for e in re.findall(r"\.\[(\w+)\]", block)]
    assert shown and set(shown) <= set(extras)


@pytest.mark.parametrize(
    "page", sorted(str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
)
def test_links_lead_somewhere(page):
    for link, heading in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", (ROOT / page).read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            target = (ROOT / page).parent.joinpath(link) if link else ROOT / page
            assert target.exists(), link
            assert not heading or heading in headings(target), f"{link}#{heading}"


def headings(page):
    """As GitHub names them in links."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_tables_of_models_are_the_catalogue():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for table in (catalog.markdown(), catalog.how_to_run()):
        assert "\n" + "\n".join(table) + "\n\n" in page


@pytest.mark.parametrize("row", list(catalog.how_to_run())[2:], ids=lambda row: row.split("`")[1])
def test_each_model_has_its_command(row):
    """Whose flags there are, in MLX too, and the checkpoints that it was checked on."""
    name, command, *checked = re.findall(r"`([^`]+)`", row)
    *_, module, shown = command.split(maxsplit=3)
    for kind in (importlib.import_module(module).Options, GenerateOptions):  # MLX has no more than the shared ones
        options = tyro.cli(kind, args=shlex.split(shown))
        assert (options.model, options.prompt) == (name, "Hello!")
    assert (catalog.find(name).repo is None) == (not checked)
    for folder in checked:
        assert (ROOT / "tests" / "reference" / folder / "reference.npz").exists()


def test_the_checks_named_are_there():
    """Of the pages that name folders, files and modules of the project in code."""
    for page in ("models.md", "architecture.md", "../CONTRIBUTING.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name in re.findall(r"`((?:tests|weights_io|minicpm_\w+|benchmarks)/[\w/.]+)`", text):
            assert (ROOT / name).exists(), name
    (row,) = [line for line in (ROOT / "docs" / "models.md").read_text().splitlines() if "-dpo, -history" in line]
    for name in re.findall(r"`(\w+)`", row):
        assert (ROOT / "tests" / "reference" / name).is_dir(), name


def test_every_flag_of_mlx_lm_is_told():
    """docs/from-mlx-lm.md has a table for each of its commands, with just the flags in its source."""
    folder = Path(find_spec("mlx_lm").submodule_search_locations[0])
    page = (ROOT / "docs" / "from-mlx-lm.md").read_text("utf-8").partition("## Flags of mlx_lm\n")[2]
    told = {}
    for section in re.split(r"^### ", page, flags=re.M)[1:]:
        name, _, rows = section.partition("\n")
        assert not re.search(r"^\| `--.*\| *\|$", rows, re.M), name  # each says what it is here
        told[name] = sorted(re.findall(r"`(--[\w-]+)`", "\n".join(re.findall(r"^\| (.*?) \|", rows, re.M))))
    assign = next(n for n in ast.walk(ast.parse((folder / "cli.py").read_text())) if isinstance(n, ast.Assign))
    assert sorted(told) == sorted(ast.literal_eval(assign.value))
    for name, flags in told.items():
        path = folder / f"{name}.py"
        source = (path if path.is_file() else folder / "quant" / path.name).read_text("utf-8")
        calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
        given = [arg for n in calls if ast.unparse(n.func).endswith(".add_argument") for arg in n.args]
        assert flags == sorted({ast.literal_eval(arg) for arg in given if ast.unparse(arg).startswith("'--")}), name
