"""Retrieval in long texts: the samples, their scores, and the command on both backends."""

import dataclasses
import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from documented_commands import typed

from minicpm_data import load_tokenizer
from minicpm_data.cli.evaluate import replies
from minicpm_data.generation.api import Generator
from minicpm_data.model_options import note_context, with_rope_scaling
from minicpm_serve import backends, longcontext, retrieval
from minicpm_serve.evaluation.needles import TASKS, Sample, answer_tokens, evaluation_samples, held_out, is_right
from minicpm_serve.retrieval import Random
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.rope_config import LongRoPE, RopeScaling

pytestmark = pytest.mark.slow  # minutes on two cores: run with the whole suite alone

COMMAND = "minicpm_serve.longcontext"
SHORTEST = {"passkey": 190, "number_string": 220, "kv_retrieval": 310}  # of the tiny tokenizer
VALUE = "0e8ab6b4-7f1b-4c5d-9f64-1a52ff7a3c11"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("babbler"))


@pytest.fixture(scope="module")
def encode(folder):
    return load_tokenizer(folder).encode


@pytest.fixture(params=["jax", "mlx"])
def backend(request):
    pytest.importorskip("mlx.core" if request.param == "mlx" else "jax")
    return request.param


@pytest.mark.parametrize(
    ("task", "answer", "reply", "right"),
    [
        ("passkey", "71432", " 71432. Remember it.", True),
        ("passkey", "71432", "the key71432", True),
        ("passkey", "71432", " 714325", False),
        ("passkey", "71432", " 7 1432 71432", False),
        ("passkey", "71432", " no idea", False),
        ("passkey", "01432", "1432", False),
        ("number_string", "5512233994", "\n5512233994", True),
        ("number_string", "5512233994", "551223399", False),
        ("kv_retrieval", VALUE, f'"{VALUE}"}}', True),
        ("kv_retrieval", VALUE, f"It is:{VALUE}.\nKey", True),
        ("kv_retrieval", VALUE, f"({VALUE})", False),
        ("kv_retrieval", VALUE, VALUE[:-1], False),
    ],
)
def test_scores(task, answer, reply, right):
    assert is_right(Sample(task, "", answer, 0.0, []), reply) is right


def test_wording():
    """As the benchmark's files and its template for models that continue a text have it."""
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    about = "There is an important info hidden inside a lot of irrelevant text."
    quiz = "I will quiz you about the important information there.\n\n"
    assert TASKS["passkey"].text("12345", 0.5, 2, Random(0)) == (
        f"{about} Find it and memorize them. {quiz}{noise}The pass key is 12345. Remember it. 12345 is the pass key.\n"
        f"{noise}\n\nWhat is the pass key?\n\nThe pass key is"
    )
    digits = "1122334455"
    assert TASKS["number_string"].text(digits, 0, 1, Random(0)) == (
        f"{about} Find it. {quiz}The sequence of digits is {digits}. Remember it. {digits} is the sequence of digits.\n"
        f"{noise}\n\nWhat is the sequence of digits?\n\nThe sequence of digits is"
    )
    text = TASKS["kv_retrieval"].text(VALUE, 1, 3, Random(0))
    before, data, after = re.fullmatch(r"(.*?JSON data:\n)({.*})(\n\nKey: .*)", text, re.DOTALL).groups()
    pairs = json.loads(data)
    assert before == "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
    assert after == f'\n\nKey: "{list(pairs)[-1]}"\nThe value associated with the specified key is: '
    assert len(pairs) == 3 and list(pairs.values())[-1] == VALUE


@pytest.mark.parametrize("task", TASKS)
def test_samples_fill_the_length(encode, task):
    most = answer_tokens(task, encode)
    one, two = (len(encode(TASKS[task].text("1", 0, size, Random(0)))) for size in (1, 2))
    unit = 2 * (two - one)  # keys differ in their tokens
    for length in (SHORTEST[task], 700, 1500):
        for sample in evaluation_samples(task, encode, length, 4):
            assert list(sample.ids) == encode(sample.prompt)
            spelled = len(encode(sample.prompt + TASKS[task].space + sample.answer)) - len(sample.ids)
            assert spelled <= most and length - unit < len(sample.ids) + most <= length
    with pytest.raises(InputError, match=f"50 tokens are too few for {task}, whose shortest .* raise the length"):
        evaluation_samples(task, encode, 50, 1)


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_drawn_by_seed(encode, task):
    first, again, other = (evaluation_samples(task, encode, 700, 6, seed) for seed in (0, 0, 1))
    assert first == again
    assert not {sample.answer for sample in first} & {sample.answer for sample in other}
    assert len({sample.answer for sample in first}) == 6 and all(held_out(sample.answer) for sample in first)
    assert [sample.depth for sample in first] == [0, 0.2, 0.4, 0.6, 0.8, 1]
    places = [sample.prompt.index(sample.answer) / len(sample.prompt) for sample in first]
    assert places == sorted(places) and places[0] < 0.5 < places[-1]
    assert [s.depth for s in evaluation_samples(task, encode, 700, 3, depths=[0.25, 1])] == [0.25, 1, 0.25]


def test_number_strings_repeat_digits():
    for seed in range(20):
        number = TASKS["number_string"].needle(Random(seed))
        assert re.fullmatch("[0-9]{10}", number) and len(re.findall(r"(?=(.)\1)", number)) >= 5


def test_training_data(folder, encode, tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for path in paths:
        ran = typed(
            "minicpm_serve.retrieval",
            "--tokenizer",
            folder,
            "--lengths",
            300,
            900,
            "--num-samples",
            30,
            "--save-path",
            path,
        )
        assert ran.returncode == 0, ran.stderr
    assert paths[0].read_text() == paths[1].read_text()
    lines = [json.loads(line) for line in paths[0].read_text().splitlines()]
    assert len(lines) == 30
    for line in lines:
        key = re.fullmatch(r" (\d{5})\.", line["completion"])[1]
        assert f"The pass key is {key}. Remember it." in line["prompt"] and not held_out(key)
        assert line["prompt"].endswith("The pass key is") and len(encode(line["prompt"] + line["completion"])) <= 901
    lengths = [len(encode(line["prompt"])) for line in lines]
    assert min(lengths) < 450 and max(lengths) > 750
    for wrong, said in (
        (("--lengths", 900, 300), "run backwards"),
        (("--lengths", 20, 300), "20 tokens are too few"),
        (("--num-samples", 0), "--num-samples is 0"),
        (("--task", "needle"), "needle"),
    ):
        ran = typed("minicpm_serve.retrieval", "--tokenizer", folder, *wrong, "--save-path", tmp_path / "none.jsonl")
        assert ran.returncode == 2 and said in ran.stderr and not (tmp_path / "none.jsonl").exists()


def test_wilson():
    assert longcontext.wilson(17, 20) == pytest.approx((0.6396, 0.9476), abs=1e-4)
    assert longcontext.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert longcontext.wilson(10, 10)[1] == 1


def test_the_score_is_given_by_depth(folder, monkeypatch, capsys, tmp_path):
    """A model that finds what lies in the first half of its prompt."""
    real = backends.get("jax")

    def stream_tokens(model, request):
        tokenizer, answers = load_tokenizer(folder), []
        for ids in request.prompts:
            text = tokenizer.decode(ids)
            place = text.index("Remember it")
            answers.append(
                text[place - 7 : place - 2] if text[:place].count("sun") < text[place:].count("sun") else "none"
            )
        yield from np.array([tokenizer.encode(" " + a, add_bos=False)[:6] for a in answers]).T

    decoding = types.SimpleNamespace(check=lambda model, request: None, stream_tokens=stream_tokens)
    sighted = dataclasses.replace(real, generator=Generator(decoding))
    monkeypatch.setattr(backends, "get", lambda name: sighted)
    report = tmp_path / "report.json"
    options = {"backend": "jax", "model": str(folder), "max_seq_length": 1000, "num_samples": 10, "save_path": report}
    longcontext.main(longcontext.Options(**options, batch_size=1))
    printed = capsys.readouterr().out
    assert re.search(r"0-10 % +1 +1\n", printed) and re.search(r"90-100 % +0 +1\n", printed)
    assert printed.endswith("passkey at 1000 tokens: 5 of 10 right, 50.0 % (23.7 to 76.3 with 95 % confidence)\n")
    written = json.loads(report.read_text())
    assert (written["right"], written["of"], written["score"]) == (5, 10, 0.5)
    assert [sample["right"] for sample in written["samples"]] == [True] * 5 + [False] * 5
    several = {**options, "lengths": (600, 1000), "plot": tmp_path / "map.png"}
    longcontext.main(longcontext.Options(**several, batch_size=1))
    assert "passkey at 600 tokens" in capsys.readouterr().out
    lengths = json.loads(report.read_text())["lengths"]
    assert [each["length"] for each in lengths] == [600, 1000] and lengths[1]["samples"] == written["samples"]
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_command(backend, folder, tmp_path):
    said = []
    for extra in ((), ("--batch-size", 3, "--prefill-step-size", 64)):
        report = tmp_path / "report.json"
        options = (
            "--backend",
            backend,
            "--model",
            folder,
            "--max-seq-length",
            300,
            "--num-samples",
            3,
            "--save-path",
            report,
        )
        ran = typed(COMMAND, *options, *extra)
        assert ran.returncode == 0, ran.stderr
        assert "passkey at 300 tokens: 0 of 3 right, 0.0 % (0.0 to" in ran.stdout and "note" not in ran.stderr
        said.append([sample["reply"] for sample in json.loads(report.read_text())["samples"]])
    assert said[0] == said[1]


def test_chat_asks_in_the_template(backend, folder, tmp_path):
    report = tmp_path / "report.json"
    options = (
        "--backend",
        backend,
        "--model",
        folder,
        "--max-seq-length",
        330,
        "--num-samples",
        2,
        "--save-path",
        report,
    )
    ran = typed(COMMAND, *options, "--chat", "--task", "number_string")
    assert ran.returncode == 0, ran.stderr
    for sample in json.loads(report.read_text())["samples"]:
        assert 330 - 12 - 72 < sample["tokens"] <= 330 - 12


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("raw", [{"type": "linear", "factor": 4}, {"type": "dynamic", "factor": 2.0}, LONGROPE, None])
def test_rope_scaling_is_that_of_a_config(backend, tmp_path, raw):
    """The logits are those of a checkpoint whose config.json says so, and not those of its own."""
    own = {"type": "linear", "factor": 2.0} if raw is None else None
    given = tiny_model.write(tmp_path / "given", max_position_embeddings=32, rope_scaling=own)
    wanted = tiny_model.write(tmp_path / "wanted", max_position_embeddings=32, rope_scaling=raw)
    load = backends.get(backend).load
    (model, tokenizer), (other, _) = load(given, "float32"), load(wanted, "float32")
    ids = [tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 4)[:60]]
    before, expected = np.asarray(model(ids)), np.asarray(other(ids))
    model.config = with_rope_scaling(model.config, raw)
    np.testing.assert_allclose(np.asarray(model(ids)), expected, rtol=0, atol=1e-6)
    assert np.abs(before - expected).max() > 1e-3
    prompts, texts = [ids[0]] * 2, []
    for which in (model, other):
        texts.append(list(replies(backends.get(backend), which, tokenizer, prompts, 2, 8)))
    assert texts[0] == texts[1]


def test_rope_scaling_of_an_answer(backend, tmp_path):
    command = "chat" if backend == "jax" else "generate"  # they share their code
    folder = tiny_model.write(tmp_path, initializer_range=0.5, tie_word_embeddings=False)
    asked = ["--prompt", "The quick brown fox"] if command == "generate" else []
    said = []
    for scaling in ("null", json.dumps(LONGROPE | {"original_max_position_embeddings": 2}), '{"type": "longrope"}'):
        options = ("--model", folder, "--max-tokens", 8, "--temp", 0, "--rope-scaling", scaling, *asked)
        ran = typed(f"minicpm_{backend}.{command}", *options, stdin="The quick brown fox\n")
        said.append((ran.returncode, ran.stdout))
    assert [code for code, _ in said] == [0, 0, 2]
    assert "--rope-scaling cannot be used: rope_scaling of type longrope has" in ran.stderr
    assert said[0] != said[1]


def test_rope_scaling_on_the_command_line(backend, tmp_path):
    report = tmp_path / "report.json"
    said = []
    for scaling, applied in (("null", None), ('{"rope_type": "linear", "factor": 4}', RopeScaling("linear", 4.0))):
        options = (
            "--backend",
            backend,
            "--max-seq-length",
            300,
            "--num-samples",
            1,
            "--save-path",
            report,
            "--rope-scaling",
            scaling,
        )
        ran = typed(COMMAND, *options)
        assert ran.returncode == 0, ran.stderr
        noted = re.search(r"note: \d+ tokens are more than the 256 .*--rope-scaling", ran.stderr) is not None
        assert noted == (applied is None)
        written = json.loads(report.read_text())
        assert written["rope_scaling"] == (applied and dataclasses.asdict(applied))
        said.append(written["samples"][0]["reply"])
    assert said[0] != said[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-seq-length", 50], "50 tokens are too few for passkey"),
        (["--num-samples", 0], "--num-samples is 0"),
        (["--max-seq-length", 0], "--max-seq-length is 0"),
        (["--batch-size", 0], "--batch-size is 0"),
        (["--depth", 0.5, 1.5], "--depth is 1.5"),
        (["--task", "book"], "book"),
        (["--backend", "torch"], "torch"),
        (["--prefill-step-size", 0], "--prefill-step-size is 0"),
        (["--rope-scaling", "{"], "--rope-scaling is not JSON"),
        (["--rope-scaling", '{"type": "sideways", "factor": 2}'], "--rope-scaling cannot be used: rope_scaling"),
        (["--rope-scaling", "4"], "--rope-scaling cannot be used: rope_scaling is 4"),
        (["--model", "{folder}/none/such"], "none/such"),
    ],
)
def test_wrong_calls(folder, arguments, said):
    filled = [str(a).format(folder=folder) if "{f" in str(a) else a for a in arguments]
    ran = typed(COMMAND, "--backend", "mlx", "--model", folder, "--max-seq-length", 300, *filled)
    assert ran.returncode == 2, ran.stderr
    assert "Traceback" not in ran.stderr and said in ran.stderr


def test_what_is_not_installed_is_named(monkeypatch):
    def missing(name):
        raise ImportError("minicpm_mlx needs MLX: pip install 'minicpm-jax-mlx[mlx]'.")

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    with pytest.raises(InputError, match="minicpm_mlx needs MLX: pip install"):
        backends.get("mlx")


def test_a_tokenizer_alone_is_enough(folder, tmp_path):
    assert retrieval._tokenizer(str(folder.parent / "tokenizer")).vocab_size > 0
    with pytest.raises(InputError, match="neither a tokenizer.json nor"):
        retrieval._tokenizer(str(Path(tmp_path)))


@pytest.mark.parametrize("rescaled", [False, True])
def test_factors_that_were_given_may_reach_further_than_the_checkpoints(capsys, rescaled):
    config = ModelConfig(max_position_embeddings=32, rope_scaling=LongRoPE((1.0,), (2.0,), 32))
    assert note_context(config, 33, "; --rope-scaling can extend it", rescaled) is not rescaled
    assert ("33 tokens are more than the 32" in capsys.readouterr().err) is not rescaled
    assert not note_context(config, 32)
    assert note_context(dataclasses.replace(config, rope_scaling=None), 33, rescaled=rescaled)
