"""The commands that both backends have, as a user types them."""

import dataclasses
import errno
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_adapter
import tiny_model
import tiny_training
from documented_commands import typed

from weights_io import command_line
from weights_io.adapters import save_adapter
from weights_io.checkpoint import open_checkpoint
from weights_io.cli.launcher import script
from weights_io.command_line import check_numbers, exit_codes, flags_of
from weights_io.errors import InputError

BACKENDS = ["minicpm_jax", "minicpm_mlx"]
COMMANDS = [
    f"{package}.{name}"
    for package in BACKENDS
    for name in ("generate", "chat", "evaluate", "parity", "kv_error", "fuse", "lora", "finetune", "pretrain")
    + ("benchmark", "cache_prompt", "convert", "perplexity", "quantize", "server")
]
COMMANDS += [
    "minicpm_jax.fit",
    "minicpm_jax.export",
    "minicpm_data.corpus",
    "minicpm_data.vocabulary",
    "minicpm_data.exercise",
    "minicpm_data.tool_exercise",
    "minicpm_data.image_exercise",
]
COMMANDS += [
    "minicpm_serve.longcontext",
    "minicpm_serve.history",
    "minicpm_serve.retrieval",
    "minicpm_serve.openai_api",
    "minicpm_serve.perplexity",
    "minicpm_serve.web",
    "minicpm_serve.batch",
    "minicpm_serve.evaluate",
]
COMMANDS += [f"weights_io.{name}" for name in ("convert", "inspect", "catalog", "adapters", "fuse", "upcycle")]
COMMANDS += ["benchmarks.sparse_down", "benchmarks.prompt_memory", "benchmarks.fit_table"]
COMMANDS += ["benchmarks.speculation", "benchmarks.concurrency", "benchmarks.graph_nodes", "benchmarks.throughput"]
COMMANDS += [
    "benchmarks.tool_calls",
    "benchmarks.loading",
    "benchmarks.tunix_peer",
    "benchmarks.paging",
    "benchmarks.paging_programs",
]
HEAVY = {"jax", "flax", "mlx.core", "mlx_lm", "transformers", "torch", "orbax", "optax", "grain", "tokenizers"}
# Asks each command that it reads for its help, in a child that has imported nothing but what all of them need.
ASKING_FOR_HELP = """
import contextlib, io, json, os, runpy, sys
import tyro, weights_io.command_line
for module in map(str.strip, sys.stdin):
    if os.fork():
        os.wait()
        continue
    sys.argv, said, code = [module, "--help"], io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    print(json.dumps([code or 0, said.getvalue(), list(sys.modules)]), flush=True)
    os._exit(0)
"""


@dataclasses.dataclass
class Few:
    top_p: float = 1.0
    max_tokens: int = 1
    seed: int = 0


@pytest.fixture(scope="module", params=BACKENDS)
def package(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("babbler"))


def run(module, *arguments, stdin="", **environment):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="surrogateescape",
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


@pytest.fixture(scope="module")
def helpful():
    """A process to ask for help."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", ASKING_FOR_HELP], **pipes) as process:
        yield process
        process.stdin.close()
    assert process.returncode == 0


@pytest.mark.parametrize("module", COMMANDS)
def test_help_costs_no_heavy_import(module, helpful):
    print(module, file=helpful.stdin, flush=True)
    code, said, imported = json.loads(helpful.stdout.readline())
    assert code == 0
    assert f"python -m {module}" in said
    assert re.search(rf"Examples?:\n  python -m {module}", said) and "None" not in said and "default: False" not in said
    assert not HEAVY & set(imported)


# What each command needs besides a mesh.
PLACED = {f"minicpm_jax.{name}": {} for name in ("generate", "chat", "evaluate", "kv_error")}
PLACED |= {f"minicpm_serve.{name}": {"backend": "jax"} for name in ("openai_api", "web", "longcontext")}
PLACED |= {"minicpm_serve.history": {"backend": "jax", "model": "pico", "save_path": Path("out")}}
PLACED |= {"minicpm_jax.parity": {"model": "pico", "reference": Path("x.npz")}}


@pytest.fixture
def eight(monkeypatch):
    """As on eight TPUs: a command that names no mesh gets one over all devices."""
    from minicpm_jax.parallel import mesh as meshes

    mesh = meshes.make_mesh("fsdp=8")
    make_mesh = meshes.make_mesh
    monkeypatch.setattr(meshes, "make_mesh", lambda text, *given: make_mesh(text, *given) if text else mesh)
    return mesh


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    folder = tmp_path_factory.mktemp("four_heads")
    return tiny_model.write(folder, dtype="bfloat16", hidden_size=512, num_hidden_layers=1, **heads)


@pytest.mark.parametrize("name", PLACED)
def test_a_mesh_of_one_process(name):
    """``--mesh`` as given; without it none on CPUs."""
    options, needed = importlib.import_module(name).Options, PLACED[name]
    assert options(**needed).placement() == {"mesh": None}
    assert options(mesh="fsdp=2,tensor=4", **needed).placement()["mesh"].shape == {"fsdp": 2, "tensor": 4}
    with pytest.raises(InputError, match="mesh tensor=3 is for 3 devices; there are 8"):
        options(mesh="tensor=3", **needed).placement()
    if "backend" in needed:
        mlx = needed | {"backend": "mlx"}
        assert options(**mlx).placement() == {}
        with pytest.raises(InputError, match="leave it out with backend mlx"):
            importlib.import_module(name).main(options(mesh="fsdp=8", **mlx))


@pytest.mark.parametrize("name", [name for name in PLACED if name != "minicpm_jax.parity"])
def test_a_mesh_of_eight_tpus(name, eight, four_heads):
    """Without ``--mesh``, the one for the heads of the checkpoint, once it is open: its name is not looked up."""
    options, needed = importlib.import_module(name).Options, PLACED[name] | {"model": "no/such-model"}
    rule = options(**needed).placement()["mesh"]
    assert rule(open_checkpoint(four_heads).config).shape == {"fsdp": 2, "tensor": 4}
    assert options(mesh="fsdp=8", **needed).placement()["mesh"].shape == {"fsdp": 8}


NOT_GENERATING = ("minicpm_serve.history", "minicpm_jax.parity", "minicpm_jax.kv_error")


@pytest.mark.parametrize("name", [name for name in PLACED if name not in NOT_GENERATING])
@pytest.mark.parametrize("matrix_unit", [True, False])
def test_what_a_command_that_generates_computes_in(name, matrix_unit, eight, four_heads, monkeypatch):
    """On a CPU: bfloat16 where a matrix unit makes it fast, in the form for decoding, which a mesh does not take."""
    from minicpm_data.model_options import load_model
    from minicpm_jax.cpu import form
    from minicpm_jax.parallel import mesh as meshes
    from minicpm_serve import backends

    monkeypatch.setattr(form, "has_matrix_unit", lambda: matrix_unit)
    options, needed = importlib.import_module(name).Options, PLACED[name] | {"model": str(four_heads)}

    def loaded(**more):
        model, _ = load_model(backends.get("jax"), options(**needed, **more), decoding=True)
        return model.model.norm.weight.dtype, model.mesh and dict(model.mesh.shape)

    assert loaded() == ("float32", {"fsdp": 2, "tensor": 4})
    assert loaded(mesh="tensor=8") == ("float32", {"tensor": 8})
    monkeypatch.setattr(meshes, "make_mesh", lambda text: None)
    assert loaded() == ("bfloat16" if matrix_unit else "float32", None)
    assert loaded(dtype="float32") == ("float32", None)


def test_generate(package, folder):
    ran = run(f"{package}.generate", "--model", folder, "--prompt", "The fox", "--max-tokens", 12)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    assert re.search(r"Prompt: \d+ tokens, [\d.]+ tokens-per-sec\n", ran.stderr)
    assert re.search(r"Generation: \d+ tokens, [\d.]+ tokens-per-sec\n", ran.stderr)
    assert re.search(r"Peak memory: [\d.]+ GB on ", ran.stderr)
    quiet = typed(
        *(f"{package}.generate", "--model", folder, "-p", "The fox", "-m", 12, "--verbose", "F"),
        *("--dtype", "float32", "--trust-remote-code", "--use-default-chat-template", "--xtc-probability", 0.5),
    )
    assert quiet.stdout == ran.stdout
    assert "note: --trust-remote-code changes nothing here: no code of a checkpoint is run\n" in quiet.stderr
    assert "note: --use-default-chat-template changes nothing here" in quiet.stderr
    assert "note: --temp 0 takes the likeliest token, so --xtc-probability changes nothing\n" in quiet.stderr
    assert "tokens-per-sec" not in quiet.stderr


def test_the_prompt_comes_from_standard_input(package, folder):
    options = ("--model", folder, "--max-tokens", 8, "--verbose", "False")
    given = typed(f"{package}.generate", *options, "--prompt", "你好，世界")
    piped = typed(f"{package}.generate", *options, "--prompt", "-", stdin="你好，世界")
    assert given.returncode == piped.returncode == 0, piped.stderr
    assert given.stdout == piped.stdout
    raw = typed(f"{package}.generate", *options, "--prompt", "你好，世界", "--ignore-chat-template")
    assert raw.returncode == 0 and raw.stdout != given.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--temp", "-1"], "--temp is -1"),
        (["--top-p", "1.5"], "error: --top-p is 1.5"),
        (["--model", "no/such-folder-here"], "no/such-folder-here"),
        (["--model", "{folder}/config.json"], "config.json is neither a model folder"),
        (["--no-such-flag"], "no-such-flag"),
        (["--dtype", "float64"], "float64"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "-"], "the prompt is empty"),
    ],
)
def test_wrong_calls(package, folder, arguments, said):
    filled = [a.format(folder=folder) for a in arguments]
    model = [] if "--model" in filled else ["--model", folder]
    ran = typed(f"{package}.generate", *model, *filled, "--seed", 4)
    assert ran.returncode == 2, ran.stderr
    assert "Traceback" not in ran.stderr and said in ran.stderr


@pytest.mark.parametrize(
    "command, said",
    [
        ("minicpm_jax.generate --max-tokns 3", "--max-tokns is unknown; did you mean --max-tokens? See {help}"),
        ("minicpm_jax.generate --temprature=1", "--temprature is unknown; did you mean --temp? See {help}"),
        ("minicpm_jax.generate --zz --yy", "--zz and --yy are unknown; see {help}"),
        ("minicpm_jax.generate -m x", "--max-tokens is x; it must be a whole number."),
        ("minicpm_jax.generate --temperature hot", "--temperature is hot; it must be a number."),
        ("minicpm_jax.generate --kv-bits 3", "--kv-bits is 3; it must be 4 or 8."),
        ("minicpm_jax.generate --verbose maybe", "--verbose is maybe; it must be True or False."),
        ("minicpm_jax.generate --max-tokens", "--max-tokens needs a whole number; none is given."),
        (
            "minicpm_jax.generate --prompt-lookup yes",
            "--prompt-lookup takes no value, and yes follows it; leave that out.",
        ),
        ("minicpm_jax.generate --temp 1 2", "--temp takes 1 value; 2 follows and belongs to no option."),
        ("minicpm_jax.generate hello", "hello does not belong to an option; see {help}"),
        ("minicpm_serve.retrieval --lengths 3 --save-path x", "--lengths needs 2 values; 1 is given."),
        ("weights_io.convert --model x", "--to and --save-path must be given; see {help}"),
        ("minicpm_jax.evaluate --require-sums 200", "--require-sums is 200; give a percentage from 0 to 100."),
        ("minicpm_jax.lora -c {yaml}", "--config {yaml}: iters is many; it must be a whole number."),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused_in_a_sentence(command, said, tmp_path):
    yaml = tmp_path / "lora.yaml"
    yaml.write_text("iters: many\n")
    module, *flags = command.format(yaml=yaml).split()
    ran = typed(module, *flags)
    said = said.format(help=f"python -m {module} --help.", yaml=yaml)
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", f"error: {said}\n")


def test_help_has_groups_and_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    said = typed("minicpm_jax.lora", "--help").stdout
    groups = "model data memory training schedule adapter device output"
    assert re.findall("─ ([a-z]+) options", said) == groups.split()
    assert all(len(line) <= 60 for line in said.splitlines() if line[:1] in "│╭╰")


def test_answers_beyond_the_context_are_noted(package, tmp_path):
    folder = tiny_model.write(tmp_path, max_position_embeddings=8)
    ran = typed(f"{package}.generate", "--model", folder, "--prompt", "The fox and the dog", "-m", 3)
    assert ran.returncode == 0 and re.search(r"note: \d+ tokens are more than the 8", ran.stderr)
    talked = typed(f"{package}.chat", "--model", folder, "-m", 3, stdin="The fox and the dog\n")
    assert "/reset begins anew" in talked.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_cannot_be_written():
    command = [sys.executable, "-m", "weights_io.catalog"]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "No space left" in ran.stderr


def test_a_file_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as end, exit_codes():
        (tmp_path / "nothing.jsonl").read_text()
    assert (end.value.code, capsys.readouterr().err.count("nothing.jsonl does not exist; check its name")) == (2, 1)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_tokens", 10**30, "max_tokens is 1000000000000000000000000000000; it must be at most 2,147,483,647."),
        ("num_layers", -(10**30), "it must be at least -2,147,483,647."),
        ("iters", 10**50, "iters is a number of more than 40 digits; it must be at most 2,147,483,647."),
        ("lengths", (1, 10**9), "lengths is 1000000000; it must be at most 2,097,152."),
        ("batch_size", 10**9, "batch_size is 1000000000; it must be at most 65,536."),
        ("seed", 2**63, "it must be at most 9,223,372,036,854,775,807."),
        ("learning_rate", float("nan"), "learning_rate is nan; give a number."),
    ],
)
def test_numbers_beyond_all_use(name, value, said):
    with pytest.raises(InputError) as error:
        check_numbers(dataclasses.make_dataclass("Options", [name])(value))
    assert said in str(error.value) and error.value.option == name
    check_numbers(dataclasses.make_dataclass("Options", ["seed", "iters", "resume"])(2**63 - 1, 2**31 - 1, True))


@pytest.mark.parametrize(
    "command",
    [
        "minicpm_jax.generate --max-tokens",
        "minicpm_mlx.chat --max-tokens",
        "minicpm_mlx.lora --iters",
        "minicpm_serve.openai_api --backend mlx --max-model-len",
        "minicpm_serve.longcontext --backend jax --max-seq-length",
        "minicpm_serve.history --backend jax --save-path {out} --batch-size",
        "minicpm_serve.retrieval --save-path {out} --num-samples",
        "minicpm_jax.fit --max-seq-length",
        "minicpm_data.corpus --save-path {out} --documents",
    ],
)
def test_a_command_takes_no_number_beyond_all_use(command, tmp_path):
    module, *flags = command.format(out=tmp_path / "out").split()
    ran = typed(module, *flags, 10**30)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1) and not list(tmp_path.iterdir())
    assert ran.stderr.startswith(f"error: {flags[-1]} is 1000000000000000000000000000000; it must be at most ")


def test_a_command_that_may_open_hardly_any_file_says_so(folder):
    """And MLX's, for which `mlx_lm` asks for thousands, runs with a hundred."""
    pytest.importorskip("mlx_lm")
    for files, code in ((8, 2), (100, 0)):
        line = f"ulimit -n {files}; exec {sys.executable} -m minicpm_mlx.generate -m 2 --model {folder}"
        ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert ran.returncode == code and "Traceback" not in ran.stderr, ran.stderr
    with pytest.raises(SystemExit) as end, exit_codes():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    assert end.value.code == 2


def test_more_memory_than_there_is(capsys):
    with pytest.raises(SystemExit) as end, exit_codes():
        np.zeros((2**60,), np.uint8)
    assert (end.value.code, capsys.readouterr().err.startswith("error: there is not enough memory; ")) == (2, True)


def test_an_error_names_its_options_as_they_were_given(monkeypatch, capsys):
    error = InputError("is 2 where {max_tokens} is {max_tokens2}.", option="top_p", others=["max_tokens"])
    assert (str(error), error.option) == ("top_p is 2 where max_tokens is {max_tokens2}.", "top_p")
    assert error.spelled(flags_of(Few)) == "--top-p is 2 where --max-tokens is {max_tokens2}."
    plain = "top_p of m/config.json is 3."  # not what was typed
    assert InputError(plain).spelled(flags_of(Few)) == plain
    assert InputError("is 3.", option="top_k").spelled(flags_of(Few)) == "top_k is 3."  # no option of this command

    def main(options):
        """Refuse."""
        raise error

    monkeypatch.setattr(sys, "argv", ["few", "--seed", "1"])
    with pytest.raises(SystemExit) as end:
        command_line.run(main, Few, "few")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --top-p is 2 where --max-tokens is {max_tokens2}.\n"


# Options that were renamed, with what else each command needs. The old flags go on working, and no help shows them.
OUT = {"--out x": "--save-path x"}
PRETRAIN = OUT | {"--steps 7": "--iters 7", "--seq-length 9": "--max-seq-length 9", "--remat": "--grad-checkpoint"}
PRETRAIN |= {"--valid-every 3": "--steps-per-eval 3"}
SERVER = {"--slots 3": "--max-num-seqs 3", "--waiting=5": "--max-queued-requests 5", "--context 9": "--max-model-len 9"}
LENGTH = {"--length 9": "--max-seq-length 9", "--samples 4": "--num-samples 4"}
RENAMED = {
    "minicpm_jax.pretrain Options --tokenizer t --data d": PRETRAIN,
    "minicpm_data.training.options PretrainOptions --tokenizer t --data d": PRETRAIN,
    "minicpm_jax.fit CommandOptions": {"--batch 2": "--batch-size 2", "--seq 9": "--max-seq-length 9"},
    "minicpm_jax.generate Options": {"--temperature 0.5": "--temp 0.5"},
    "minicpm_jax.chat Options": {"--temperature 0.5": "--temp 0.5"},
    "minicpm_jax.export Options --checkpoint c": OUT,
    "minicpm_serve.openai_api Options --backend jax": SERVER,
    "minicpm_serve.longcontext Options --backend mlx": LENGTH | {"--json x": "--save-path x"},
    "minicpm_serve.history Options --backend mlx": LENGTH | OUT,
    "minicpm_serve.retrieval Options": OUT | {"--samples 4": "--num-samples 4"},
    "minicpm_data.corpus Options": OUT,
    "minicpm_data.exercise Options": OUT,
    "minicpm_data.vocabulary Options --data d": OUT
    | {"--size 9": "--vocab-size 9", "--max-length 9": "--model-max-length 9"},
    "weights_io.convert Options --model m --to hf": OUT,
    "weights_io.adapters Options --to peft": OUT,
    "weights_io.upcycle Options": OUT | {"--experts 4": "--num-experts 4", "--top-k 3": "--num-experts-per-tok 3"},
}


@pytest.mark.parametrize("command", RENAMED)
def test_former_flags_go_on_working(command, monkeypatch, capsys):
    module, name, *needed = command.split()
    options, found = getattr(importlib.import_module(module), name), []

    def main(given):
        """Keep the options."""
        found.append(given)

    def run_with(*flags):
        monkeypatch.setattr(sys, "argv", [module, *flags])
        command_line.run(main, options, module)

    for flags in (RENAMED[command].keys(), RENAMED[command].values()):
        words = " ".join(flags).split()
        run_with(*needed, *words)
    assert found[0] == found[1] and type(found[0]) is options
    with pytest.raises(SystemExit):
        run_with("--help")
    words = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert not words & {flag.partition("=")[0].split()[0] for flag in RENAMED[command]}


@pytest.mark.parametrize("flag", ["--max-length", "--model-max-length"])
def test_an_error_names_the_flag_as_it_was_typed(flag, tmp_path):
    ran = typed("minicpm_data.vocabulary", "--data", tmp_path, "--save-path", tmp_path / "out", f"{flag}=-7")
    assert (ran.returncode, ran.stderr) == (2, f"error: {flag} is -7; it must be at least 1.\n")


def test_help_says_nothing_of_a_default_that_is_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["openai_api", "--help"])
    from minicpm_serve.openai_api import Options

    with pytest.raises(SystemExit):
        command_line.run(lambda options: None, Options, "openai_api")
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: 8000)" in said and "None" not in said and "(default: )" not in said
    assert "--max-num-seqs INT " in said and "--quantize {4,8} " in said


def test_a_folder_that_is_gone_is_not_called_none(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as end, exit_codes():
        os.getcwd()
    assert (end.value.code, capsys.readouterr().err.count("the folder that this was started in, does not exist")) == (
        2,
        1,
    )


@pytest.mark.parametrize("package", ["weights_io", "minicpm_data", *BACKENDS, "minicpm_serve"])
def test_what_there_is_to_run(package):
    """All commands of a package."""
    usage, _, *lines = typed(f"{package}.__main__").stdout.splitlines()
    assert usage.startswith(f"usage: python -m {package} COMMAND")
    assert [f"{package}.{line.split()[0]}" for line in lines] == sorted(c for c in COMMANDS if package in c)


def test_a_command_is_started_by_its_name(monkeypatch, capsys):
    """Without the dot, and by the console script; its help shows what was typed."""
    help_page = typed("weights_io.__main__", "convert", "--help").stdout
    assert help_page.startswith("usage: python -m weights_io convert ")
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/minicpm-mlx", "kv-error", "--help"])
    with pytest.raises(SystemExit) as end:
        script()
    assert not end.value.code and capsys.readouterr().out.startswith("usage: minicpm-mlx kv-error ")


@pytest.mark.parametrize("word, remedy", [("genrate", "minicpm_jax generate?"), ("--model", "--help lists them")])
def test_a_wrong_name_of_a_command(word, remedy):
    ran = typed("minicpm_jax.__main__", word)
    assert (ran.returncode, ran.stdout) == (2, "") and ran.stderr.count("\n") == 1 and remedy in ran.stderr


def test_flags_of_mlx_lm(tmp_path, folder):
    """What needs nothing here is noted, what is not here is refused by name."""
    to = ["--hf-path", folder, "--mlx-path", tmp_path / "out", "--trust-remote-code"]
    done = typed("minicpm_mlx.convert", *to)
    assert done.returncode == 0 and (tmp_path / "out" / "config.json").exists()
    assert done.stderr == "note: --trust-remote-code is not needed here: the code of a checkpoint is never run\n"
    for wrong in (["--upload-repo", "x"], ["--quant-predicate=mixed_2_6"], ["-q", "--q-mode", "mxfp4"], ["-q", "-d"]):
        ran = typed("minicpm_mlx.convert", "--hf-path", folder, "--mlx-path", tmp_path / "other", *wrong)
        assert ran.returncode == 2 and ran.stderr.startswith("error: --") and not (tmp_path / "other").exists()


def test_benchmark(package, folder):
    ran = typed(f"{package}.benchmark", "--model", folder, "-p", 8, "-g", 3, "-n", 2, "-b", 2, "--dtype", "float32")
    assert ran.returncode == 0 and re.findall(r"^(Trial \d|Averages): +prompt_tps=[1-9]", ran.stdout, re.M) == [
        "Trial 1",
        "Trial 2",
        "Averages",
    ]
    cells = ran.stdout.splitlines()[-1].strip("| ").split(" | ")
    heads = re.search(r"^\| (date .*) \|$", Path("docs/measured.md").read_text("utf-8"), re.M)[1].split(" | ")
    assert len(cells) == len(heads) and dict(zip(heads, cells, strict=True))["prompt + answer tokens"] == "2 x 8 + 3"


def test_perplexity(package, tmp_path, folder):
    """The number of mlx_lm's own perplexity, for the same samples."""
    import mlx.core as mx
    from mlx_lm.perplexity import eval_ppl

    from minicpm_mlx import load
    from minicpm_serve.evaluation.perplexity import samples
    from minicpm_serve.perplexity import encoded

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "hello world " * n}) + "\n" for n in range(2, 9)))
    model, tokenizer = load(folder, dtype="float32")
    rows = samples(encoded(data, tokenizer), 8, 5, 123)
    value, error = eval_ppl(model, mx.array(rows), batch_size=2)
    flags = ["--data-path", data, "--sequence-length", 8, "--num-samples", 5, "--batch-size", 2, "--dtype", "float32"]
    ran = typed(f"{package}.perplexity", "--model", folder, *flags)
    found = re.search(r"Perplexity: ([\d.]+) ± ([\d.]+)", ran.stdout)
    np.testing.assert_allclose([float(found[1]), float(found[2])], [value, error], rtol=1e-4, atol=1e-3)
    assert samples([[1, 2, 3]], 8, -1, 0) == [[1, 2, 3]]
    for wrong in (["--data-path", "allenai/tulu"], ["--data-path", data, "--num-samples", 0]):
        assert typed(f"{package}.perplexity", "--model", folder, *wrong).returncode == 2


def test_a_reader_that_goes_away_is_no_error():
    """And an output that cannot be written is one."""
    with open(os.devnull) as closed:
        left = subprocess.run([sys.executable, "-m", "weights_io"], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert left.returncode == 2 and left.stderr.count("\n") == 1
    with subprocess.Popen([sys.executable, "-m", "weights_io"], stdout=-1, stderr=-1) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_undecodable_standard_input_is_refused(package, folder):
    ran = run(f"{package}.generate", "--model", folder, "--prompt", "-", stdin="\udcff\udcfe")
    assert (ran.returncode, ran.stderr.count("error:")) == (2, 1)
    assert "UTF-8" in ran.stderr


def test_chat(package, folder):
    lines = "Hello\n/help\n/reset\n\n你好\n/quit\nnever read\n"
    ran = typed(f"{package}.chat", "--model", folder, "--seed", 1, "--max-tokens", 6, stdin=lines)
    assert ran.returncode == 0, ran.stderr
    assert "/reset" in ran.stdout
    call = (f"{package}.chat", "--model", folder, "--seed", 1, "--max-tokens", 6)
    ended = typed(*call, "--prefill-step-size", 16, stdin="Hello\n")
    assert ended.returncode == 0 and ran.stdout.startswith(ended.stdout)
    refused = typed(*call, "--kv-bits", 4, stdin="Hello\n")  # at once, not after the question
    assert (refused.returncode, refused.stdout) == (2, "") and refused.stderr.startswith("error: --kv-")


def test_evaluate_counts(package, folder):
    ran = typed(f"{package}.evaluate", "--model", folder, "--limit", 6, "--max-tokens", 4)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"sum +0 of +4 right, 0.0%", ran.stdout) and "count" in ran.stdout
    assert typed(f"{package}.evaluate", "--limit", 0).returncode == 2


def test_evaluate_compares_with_an_earlier_run(folder, tmp_path):
    asked = ("minicpm_mlx.evaluate", "--limit", 6, "--max-tokens", 4)
    first = typed(*asked, "--model", folder, "--save-path", tmp_path / "before.json")
    written = json.loads((tmp_path / "before.json").read_text())
    assert first.returncode == 0 and written["scores"]["sum"] == 0 and len(written["questions"]) == 6
    ran = typed(*asked, "--before", tmp_path / "before.json", "--plot", tmp_path / "scores.png")
    assert re.search(r"sum +\d of +4 right, [\d.]+% \(before: 0.0%\)", ran.stdout), ran.stderr
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "before.json").write_text('{"scores": {"sum": 95}}')
    wrong = typed(*asked, "--before", tmp_path / "before.json")
    assert (wrong.returncode, wrong.stdout) == (2, "") and "holds no scores" in wrong.stderr


def test_a_run_that_compiles_says_only_how_long(folder, tmp_path):
    """Programs that compile in less than half a second are not kept for the next run."""
    ran = run("minicpm_jax.generate", "--model", folder, "-m", 4, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "new"))
    assert re.search(r"^Compiling: \d+\.\d s$", ran.stderr, re.MULTILINE), ran.stderr


def test_an_adapter_changes_the_answer(package, folder, tmp_path):
    checkpoint = open_checkpoint(folder)
    adapter = tiny_adapter.make(checkpoint)
    loud = {name: dataclasses.replace(matrices, b=30 * matrices.b) for name, matrices in adapter.tensors.items()}
    save_adapter(tmp_path / "adapter", dataclasses.replace(adapter, tensors=loud), checkpoint.config)
    call = (f"{package}.generate", "--model", folder, "-p", "The fox", "-m", 12, "--verbose", "False")
    plain, adapted = typed(*call), typed(*call, "--adapter-path", tmp_path / "adapter")
    assert adapted.returncode == 0, adapted.stderr
    assert adapted.stdout.strip() and adapted.stdout != plain.stdout


def test_adapters_that_do_not_fit_are_refused_in_a_sentence(package, folder, tmp_path):
    other = open_checkpoint(tiny_model.write(tmp_path, hidden_size=64))
    save_adapter(tmp_path / "adapter", tiny_adapter.make(other), other.config)
    first = "layers.0.self_attn.q_proj.lora_A.weight in {}/adapter_model.safetensors has shape [4, 64] and the model "
    for command, path, said in (("generate", tmp_path / "adapter", first), ("chat", tmp_path, "{} is no adapter")):
        ran = typed(f"{package}.{command}", "--model", folder, "--adapter-path", path)
        assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
        assert said.format(path) in ran.stderr


# Mistakes that need no backend to be seen; {0} is a folder with a model, data and nothing else.
REFUSED = [f"minicpm_{backend}.{call}" for backend in ("jax", "mlx") for call in (
    "generate --model /nope",
    "generate --model {0}/model --adapter-path {0}",
    "chat --model no/such/model/here",
    "evaluate --model {0}/model --data {0}/none.jsonl",
    "evaluate --model {0}/model --plot {0}/picture.pdf",
    "parity --model /nope --reference {0}/reference.npz",
    "kv_error --model {0}/model --data {0}/none.txt",
    "lora --model /nope --data {0}/data",
    "lora --model {0}/model --data {0}/none",
    "lora --model {0}/model --data {0}/data --adapter-path {0}",
    "pretrain --init-from /nope --tokenizer {0}/model --data {0}/data --save-path {0}/new",
    "pretrain --config {0}/none.json --tokenizer {0}/model --data {0}/data --save-path {0}/new",
    "fuse --model {0}/model --adapter-path {0}/none --save-path {0}/new",
)]  # fmt: skip
REFUSED += [f"minicpm_serve.{call}" for call in (
    "longcontext --backend jax --model /nope",
    "longcontext --backend mlx --model {0}/model --plot {0}/none/x.png",
    "history --backend jax --folders /nope --save-path {0}/new",
    "openai_api --backend mlx --model /nope --port 0",
    "batch --backend mlx --prompts {0}/none.txt --out {0}/new.jsonl",
    "batch --backend jax --model /nope --prompts {0}/data/train.jsonl --out {0}/new.jsonl",
    "evaluate --backend mlx --tasks x --include-path {0}/none",
    "evaluate --backend jax --tasks x --output-path {0}/none/x.json",
)]  # fmt: skip
REFUSED += ["minicpm_jax.fit --model /nope", "minicpm_jax.fit --plot {0}/none/x.png"]
REFUSED += ["weights_io.convert --model /nope --to hf --save-path {0}/new"]
REFUSED += ["weights_io.convert --model {0}/model --to hf --save-path {0}"]
# Runs each command line that it reads, in a child that has imported nothing but what all of them need.
REFUSING = """
import contextlib, io, json, os, runpy, sys
import numpy, tyro, weights_io.checkpoint, weights_io.command_line, minicpm_data.training.options
for line in map(str.split, sys.stdin):
    if os.fork():
        os.wait()
        continue
    sys.argv, said, code = line, io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_module(line[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    print(json.dumps([line, code or 0, said.getvalue(), sorted({"jax", "mlx.core", "torch"} & set(sys.modules))]))
    sys.stdout.flush()
    os._exit(0)
"""


def test_a_cheap_mistake_is_refused_before_a_backend_is_imported(folder, tmp_path):
    (tmp_path / "model").symlink_to(folder)
    tiny_training.write_data(tmp_path / "data", tiny_training.chats(2), valid=tiny_training.chats(2, seed=1))
    np.savez(tmp_path / "reference.npz", input_ids=np.ones((1, 2), int))
    before = sorted(tmp_path.iterdir())
    lines = "".join(command.format(tmp_path) + "\n" for command in REFUSED)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", REFUSING], input=lines, env=environment, capture_output=True, text=True)
    results = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(results) == len(REFUSED), ran.stderr
    wrong = [result for result in results if (result[1], result[2].count("\n"), result[3]) != (2, 1, [])]
    assert not wrong and all(said.startswith("error: ") for _, _, said, _ in results), wrong or results
    assert sorted(tmp_path.iterdir()) == before
