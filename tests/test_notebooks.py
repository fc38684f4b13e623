"""Every notebook, run whole by the cells that a user of a TPU or a Mac runs: only the variables at the top are others.

The kernels have the CPU alone, with eight devices that are not there (`conftest`), and MINICPM_NOTEBOOK_CPU says that
this is meant.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "tests" / "reference" / "s_1b"  # the original's numbers, and no tokenizer
MIXTURE = ROOT / "tests" / "reference" / "moe_8x2b"


@dataclass(frozen=True)
class Run:
    notebook: str
    variables: dict[str, object]  # what a user would write at the top
    printed: list[str]  # regular expressions
    pictures: int = 0


RUNS = [
    Run(
        "colab_tpu_chat",
        {"MODEL": "pico"},
        [r"\n12 \+ 30 = 42\n", r"'fsdp': 8", r"\n7 \+ 8 = 15\n", r"4 rows: [\d.]+ tokens/s, 5\.2 MB of weights"],
    ),
    Run(
        "colab_tpu_lora",
        {"MODEL": "pico", "ITERS": 30, "QUESTIONS": 10},
        [
            r"exact +0 of +10 right",
            r"exact +[1-9]\d? of +10",
            r"adapter_model\.safetensors",
            r"fused-llama: LlamaForCausalLM",
            r"the answer is 42\.",
        ],
        pictures=1,
    ),
    Run(
        "mac_mlx",
        {"MODEL": "pico", "ITERS": 3, "QUESTIONS": 4},
        [r"12 \+ 30 = 42", r"bits per weight", r"is Paris"],
        pictures=1,
    ),
    Run(
        "pretrain_wsd",
        {"STEPS": 18, "DOCUMENTS": 4000, "BATCH": 1, "QUESTIONS": 4},
        [r"pico +width +128 .* x 0\.500", r"width +2304 .* x 0\.111", r"sum +\d+ of(.|\n)*sum +\d+ of"],
        pictures=2,
    ),
    Run(
        "checkpoints",
        {"MODEL": "pico"},
        [
            r"dense_1b in float32: all \d\d cases hold",
            r"converted in float32: the one case holds",
            r"layers\.mlp\.up_proj\.weight +float32 \(6, 320, 128\) +\(6, 320, 16\) on each of 8",
            r"layers\.input_layernorm\.weight +float32 \(6, 128\) +whole on each of 8",
            r"the same numbers",
        ],
    ),
    Run(
        "checkpoints",
        {"MODEL": str(MIXTURE), "REFERENCE": str(MIXTURE / "reference.npz")},
        [
            r"moe_8x2b in float32: all \d\d cases hold",
            r"'expert': 8",
            r"mlp\.experts\.w1\.weight +float32 \(3, 8, 40, 64\) +\(3, 1, 40, 64\) on each of 8",
            r"mlp\.gate\.weight +float32 \(3, 8, 64\) +whole on each of 8",
            r"self_attn\.q_proj\.weight .* whole on each of 8",
            r"the same numbers",
        ],
    ),
    Run(
        "checkpoints",
        {"MODEL": str(REFERENCE), "REFERENCE": str(REFERENCE / "reference.npz")},
        [r"s_1b in float32: all \d\d cases hold", r"converted in float32: the one case holds"],
    ),
]


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def execute(name, variables, folder, before="", kernel="python3", timeout=120):
    """The notebook, run in ``folder`` with other variables at its top and, ``before`` it, a cell that a user might have
    run; what it printed, and its outputs."""
    notebook = set_variables(read(name), variables)
    if before:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(before))
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=timeout, kernel_name=kernel, resources=resources).execute()
    if kept := os.environ.get("KEEP_NOTEBOOKS"):  # a folder, to look at them
        nbformat.write(notebook, Path(kept) / f"{name}.ipynb")
    return printed(notebook), [output for cell in code(notebook) for output in cell.outputs]


def set_variables(notebook, variables):
    first = code(notebook)[0]
    for variable, value in variables.items():
        assignment = rf"^{variable} = .*?(?=  #|$)"
        first.source, count = re.subn(assignment, lambda _: f"{variable} = {value!r}", first.source, flags=re.M)  # noqa: B023
        assert count == 1, variable
    return notebook


def printed(notebook):
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.fixture
def kernels(monkeypatch):
    """Their environment."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MINICPM_NOTEBOOK_CPU", "1")


def as_parameter(run):
    """What `make test-colab` runs too is left to it and to `make test-heavy`, but for one of each backend."""
    name = f"{run.notebook}-{Path(str(run.variables.get('MODEL'))).name}"
    here = name in ("mac_mlx-pico", "checkpoints-pico")
    return pytest.param(run, id=name, marks=pytest.mark.slow if here else pytest.mark.notebook)


@pytest.mark.parametrize("run", map(as_parameter, RUNS))
def test_runs_whole(run, tmp_path, kernels):
    said, outputs = execute(run.notebook, run.variables, tmp_path)
    assert "because MINICPM_NOTEBOOK_CPU is set" in said
    for expected in run.printed:
        assert re.search(expected, said), (expected, said)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == run.pictures


@pytest.mark.parametrize("name", ["colab_tpu_chat", "mac_mlx"])
def test_a_cpu_that_nobody_asked_for_is_refused(name, tmp_path, kernels, monkeypatch):
    """In a sentence, without a traceback."""
    monkeypatch.delenv("MINICPM_NOTEBOOK_CPU")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="wants a .*, and there is only a CPU;") as stopped:
        execute(name, {}, tmp_path)
    assert "Traceback" not in str(stopped.value) and "check_runtime" not in str(stopped.value).rpartition("-----")[2]


@pytest.mark.parametrize("name", sorted({run.notebook for run in RUNS}))
def test_is_kept_as_a_reader_wants_it(name):
    notebook = read(name)
    title, badge, purpose = notebook.cells[0].source.split("\n\n")[:3]
    assert title.startswith("# ") and f"/blob/main/notebooks/{name}.ipynb)" in badge and "**Runtime**" not in purpose
    assert "**Runtime**: a " in notebook.cells[0].source
    assert all(cell.execution_count is None and cell.outputs == [] for cell in code(notebook))
    for link in re.findall(r"\]\(([^)]+)\)", text(notebook).replace(badge, "")):  # Colab opens the notebook alone
        file = re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/blob/main/(docs/.+)", link)
        assert file is not None and (ROOT / file[1]).exists(), link


@pytest.mark.parametrize("name", sorted({run.notebook for run in RUNS}))
def test_no_cell_removes_what_is_worked_on(name):
    """Neither the model, nor a training that the same cell could go on with."""
    cells = [cell.source for cell in code(read(name))]
    for removed in re.findall(r"notebook\.fresh\((.*)\)", "\n".join(cells)):
        assert removed.endswith(", keep=MODEL")
    for folder in re.findall(r"notebook\.run_folder\((.*)\)", "\n".join(cells)):
        assert re.fullmatch(r'"\w+", MODEL(, DRIVE)?', folder)
    for cell in (cell for cell in cells if re.search(r"minicpm_\w+\.(lora|finetune|pretrain) ", cell)):
        assert "fresh(" not in cell and "run_folder(" not in cell and "{notebook.resume(" in cell


def test_these_are_the_notebooks():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == {run.notebook for run in RUNS}


def first_cell(name):
    """Without its variables."""
    return code(read(name))[0].source.partition("\n\n")[2]


def test_the_first_cells_are_the_same():
    """Below their variables, but for the backend and what is said of it."""
    cells = {re.sub(r"mlx|jax|  # .*", "", first_cell(run.notebook)) for run in RUNS}
    assert len(cells) == 1 and len({first_cell(run.notebook) for run in RUNS}) == 2


def sourced(name, source):
    """What the first cell would give to pip; it is imported from where the test stands."""
    defined = {"SOURCE": source}
    exec(first_cell(name).partition("\n\nif not any(")[0], defined)
    return defined["source"]()


GITHUB = "git+https://github.com/someone/minicpm-jax-mlx"


@pytest.mark.parametrize("name", ["colab_tpu_chat", "mac_mlx"])
def test_a_clone_that_is_there_is_installed(name, tmp_path, monkeypatch):
    """In it, around the notebook, or beside it; whatever SOURCE says."""
    for clone, place in (("beside/minicpm-jax-mlx", ".."), ("in", "."), ("around", "notebooks")):
        for folder in ("notebooks", "minicpm_jax", "minicpm_mlx"):
            (tmp_path / clone / folder).mkdir(parents=True)
        monkeypatch.chdir(tmp_path / clone / place)
        assert sourced(name, GITHUB) == str(tmp_path / clone)


@pytest.mark.parametrize("name", sorted({run.notebook for run in RUNS}))
def test_what_source_may_be(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a clone").mkdir()
    (tmp_path / "a.whl").touch()
    for given, taken in {
        GITHUB: GITHUB,
        "someone": GITHUB,
        "https://github.com/someone/minicpm-jax-mlx": GITHUB,
        "git+https://elsewhere.org/x@branch": "git+https://elsewhere.org/x@branch",
        "https://elsewhere.org/a.whl": "https://elsewhere.org/a.whl",
        "a clone": str(tmp_path / "a clone"),
        str(tmp_path / "a.whl"): str(tmp_path / "a.whl"),
    }.items():
        assert sourced(name, given) == taken
    for given, said in (("git+https://github.com/OWNER/minicpm-jax-mlx", "account"), ("dist/no.whl", "is not here")):
        with pytest.raises(Exception, match=said) as stopped:
            sourced(name, given)
        assert stopped.value._render_traceback_() == [str(stopped.value)]  # what a notebook shows


def test_the_account_is_written_into_copies(tmp_path):
    """Into badges and install lines alike, as often as one likes, and into the READMEs."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for name in ("Makefile", "README.md", "README.zh.md"):
        shutil.copy(ROOT / name, tmp_path)

    def make(*git):
        for arguments in git:
            subprocess.run(["git", *arguments.split()], cwd=tmp_path, check=True)
        command = ["make", "badges", f"PYTHON={sys.executable}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert "has no origin" in make("init -q").stderr
    assert "not on GitHub" in make("remote add origin /somewhere/else.git").stderr
    for url in ("git@github.com:first/one.git", "https://github.com/second/an.other"):
        assert make(f"remote set-url origin {url}").returncode == 0
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+?)(?=/blob/main/|\\\")", text)
        assert set(named) == {"second/an.other"} and len(named) == 2 + text.count("/blob/main/docs/")
        nbformat.validate(nbformat.read(path, as_version=4))
    for name in ("README.md", "README.zh.md"):
        written = (tmp_path / name).read_text(encoding="utf-8")
        assert written == (ROOT / name).read_text(encoding="utf-8").replace("OWNER/minicpm-jax-mlx", "second/an.other")
        assert "git+https://github.com/second/an.other'" in written


def test_memory_is_what_fit_says():
    """Every figure in the text stands in the tables that are made by the package's own commands."""
    tables = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("fit.md", "models.md"))
    figures = {figure for run in RUNS for figure in re.findall(r"[\d.,]+ GB", text(read(run.notebook)))}
    assert figures and not {figure for figure in figures if figure not in tables}


def test_an_interrupt_ends_a_command_and_not_the_notebook(monkeypatch):
    """Ctrl-C while a training command starts would end a process of its own."""
    from minicpm_data.cli import notebook
    from minicpm_data.training.processes import leaving_at_interrupts

    def command(*_, **__):
        with leaving_at_interrupts():
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("runpy.run_module", command)
    with pytest.raises(KeyboardInterrupt):
        notebook.run("python -m minicpm_jax.lora")
    assert signal.getsignal(signal.SIGINT) is before


def test_what_an_earlier_run_wrote_is_removed(tmp_path, monkeypatch):
    """But not the model that is worked on, nor anything elsewhere."""
    from minicpm_data.cli import notebook
    from weights_io.errors import InputError

    monkeypatch.chdir(tmp_path)
    for name in ("exercise", "fused"):
        (tmp_path / name).mkdir()
    notebook.fresh("exercise", "never-there", keep="minicpm-2b")
    assert {path.name for path in tmp_path.iterdir()} == {"fused"}
    for names, model in ((("fused",), "fused"), (("fused",), str(tmp_path / "fused" / "model")), (("../x",), "")):
        with pytest.raises(InputError, match="rename it"):
            notebook.fresh(*names, keep=model)
    assert (tmp_path / "fused").is_dir()


@pytest.fixture
def colab(monkeypatch):
    """Colab's own package, in this process and in those that it starts."""
    if Path("/content").is_dir():
        pytest.skip("this is Colab, whose Drive is its user's")
    folder = str(ROOT / "tests" / "colab")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((folder, str(ROOT))))
    before = set(sys.modules)
    yield
    for name in [name for name in set(sys.modules) - before if name.startswith("google.colab")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("model", "before", "secret", "printed", "after"),
    [
        ("minicpm-2b", None, " hf_secret\n", "HF_TOKEN is that of the secrets of Colab\n", "hf_secret"),
        ("minicpm-2b", "hf_mine", "hf_secret", "", "hf_mine"),
        ("pico", None, "hf_secret", "", None),
        *(
            (
                "minicpm-2b",
                None,
                error,
                f"no HF_TOKEN from the secrets of Colab ({error}); public models need none\n",
                None,
            )
            for error in ("NotebookAccessError", "SecretNotFoundError", "TimeoutException")
        ),
    ],
)
def test_the_token_is_that_of_the_secrets(model, before, secret, printed, after, colab, monkeypatch, capsys):
    """Where it is wanted and not there; what says so never shows it."""
    from minicpm_data.cli import notebook

    monkeypatch.setenv("HF_TOKEN", before or "")  # restored at the end, whatever is written meanwhile
    monkeypatch.setenv("COLAB_TOKEN", secret)
    notebook.take_token(model)
    assert capsys.readouterr().out == printed
    assert (os.environ["HF_TOKEN"] or None) == after


def test_a_run_in_drive_is_kept(tmp_path, colab, monkeypatch, capsys):
    from minicpm_data.cli import notebook
    from weights_io.errors import InputError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="mount failed.*set DRIVE = False"):
        notebook.run_folder("adapters", "minicpm-1b", True)
    (drive := tmp_path / "of-google" / "MyDrive").mkdir(parents=True)
    monkeypatch.setenv("COLAB_DRIVE", str(drive.parent))
    folder = Path(notebook.run_folder("adapters", "openbmb/MiniCPM-1B-sft-bf16", True))
    assert folder.parent.resolve() == drive / "minicpm-jax-mlx" and folder.name == "adapters-MiniCPM-1B-sft-bf16"
    assert "a new run" in capsys.readouterr().out and notebook.resume(str(folder)) == ""
    (folder / "checkpoints" / "100").mkdir(parents=True)
    (folder / "settings.json").write_text("{}")
    assert notebook.run_folder("adapters", "openbmb/MiniCPM-1B-sft-bf16", True) == str(folder)
    assert "which goes on" in capsys.readouterr().out and notebook.resume(str(folder)) == "--resume"
    assert "other" in notebook.run_folder("adapters", "minicpm-1b", "other").split("/")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(InputError, match="is in Google Drive, where nothing is removed"):
        notebook.run_folder(folder.name, "minicpm-1b")
    (tmp_path / "adapters").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is in Google Drive, where nothing is removed"):
        notebook.fresh("adapters", keep="minicpm-1b")
    assert (folder / "settings.json").exists()


def test_drive_is_colabs(tmp_path, monkeypatch):
    from minicpm_data.cli import notebook
    from weights_io.errors import InputError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="only Colab mounts; set DRIVE = False"):
        notebook.run_folder("adapters", "minicpm-1b", True)


@pytest.mark.notebook
def test_a_training_in_drive_goes_on_after_a_disconnect(tmp_path, kernels, colab, monkeypatch):
    """By the same cells on another machine."""
    (drive := tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    monkeypatch.setenv("COLAB_DRIVE", str(drive.parent))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    run = drive / "minicpm-jax-mlx" / "adapters-pico"

    def run_all(machine, iters):
        (tmp_path / machine).mkdir()
        notebook = set_variables(read("colab_tpu_lora"), {"MODEL": "pico", "ITERS": iters, "DRIVE": True})
        last = next(i for i, cell in enumerate(notebook.cells) if "minicpm_jax.lora " in cell.source)
        notebook.cells = [cell for cell in notebook.cells[: last + 1] if "minicpm_jax.evaluate" not in cell.source]
        client = nbclient.NotebookClient(
            notebook, timeout=120, resources={"metadata": {"path": str(tmp_path / machine)}}
        )
        return notebook, client

    _, client = run_all("first", 160)

    def disconnect():
        until = time.monotonic() + 120
        while time.monotonic() < until and not (run / "checkpoints" / "20").exists():
            time.sleep(0.02)
        os.kill(client.km.provisioner.pid, signal.SIGKILL)

    thread = threading.Thread(target=disconnect, daemon=True)
    thread.start()
    with pytest.raises(nbclient.exceptions.DeadKernelError):
        client.execute()
    notebook, client = run_all("second", 24)
    client.execute()
    said = printed(notebook)
    assert f"{run.name}: holds a run, which goes on" in said and "resuming after step 20" in said
    assert (run / "adapter_model.safetensors").exists() and not (tmp_path / "second" / "adapters").exists()


def test_commands_run_in_this_process(tmp_path, capsys):
    from minicpm_data.cli import notebook
    from weights_io.errors import InputError

    notebook.run("python -m weights_io.catalog")
    assert "minicpm-2b" in capsys.readouterr().out
    with pytest.raises(InputError, match="weights_io.inspect ended with 2"):
        notebook.run(f"python -m weights_io.inspect\n --model {tmp_path / 'nothing'}")
    assert "error: " in capsys.readouterr().err
    with pytest.raises(InputError, match="python -m"):
        notebook.run("make demo twice")


@pytest.mark.parametrize(
    ("changes", "rows", "left_out"),
    [
        ({}, 1, lambda c: 0),
        ({"tie_word_embeddings": False}, 1, lambda c: c.vocab_size * c.hidden_size),
        ({"num_experts": 4, "num_experts_per_tok": 1}, 3, lambda c: 3 * c.num_hidden_layers * c.hidden_size * 48),
    ],
)
def test_what_a_step_has_to_read(changes, rows, left_out):
    """Not the rows of an untied embedding, nor experts that nobody can have chosen (1 of 4 by 3 rows)."""
    import jax

    from minicpm_jax.model import initialize
    from minicpm_jax.notebook import Speed, bytes_read
    from weights_io.config import ModelConfig
    from weights_io.parameters import count

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModelConfig.from_dict({"vocab_size": 64, **shape, **changes})
    read = bytes_read(initialize(config, jax.random.key(0)), rows)
    assert read == 4 * (count(config) - left_out(config))
    assert "50% of what" in str(Speed(rows, 100.0 * rows, read, 0.005))
    assert "not known" in str(Speed(rows, 100.0 * rows, read, None))
