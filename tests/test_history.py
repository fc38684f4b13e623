"""One evaluation over several checkpoints: what it measures, what it keeps, and the curve."""

import json
import shutil

import numpy as np
import pytest
import tiny_model
from documented_commands import typed

from minicpm_data.diagnostics import parity
from minicpm_serve import backends, history
from minicpm_serve.evaluation import curves, perplexity
from weights_io.built_in import built_in
from weights_io.errors import InputError

pytestmark = pytest.mark.slow  # minutes on two cores: run with the whole suite alone

COMMAND = "minicpm_serve.history"
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Two checkpoints of the tiny model, and a text of three lines."""
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        shutil.copytree(tiny_model.write(folder / f"made{step}", seed=step), folder / f"step{step}00")
    lines = ["The quick brown fox jumps over the lazy dog.", "Hello world, this is the sea.", "In 1998 there were 42."]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "text.txt").write_text(lines[0])
    return folder


@pytest.fixture(params=["jax", "mlx"])
def backend(request):
    pytest.importorskip("mlx.core" if request.param == "mlx" else "jax")
    return request.param


def records(out):
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def test_loss_over_folders(backend, run_folder, tmp_path):
    options = (
        "--backend",
        backend,
        "--model",
        run_folder,
        "--evaluation",
        "loss",
        "--max-seq-length",
        16,
        "--save-path",
        tmp_path,
    )
    options += ("--data", run_folder / "text.jsonl", "--folders", "step100")
    refused = typed(COMMAND, *options, "step250")
    assert f"error: step250: '{run_folder}/step250' is no folder" in refused.stderr and not list(tmp_path.iterdir())
    (run_folder / "step150").mkdir(exist_ok=True)
    failed = typed(COMMAND, *options, "step150", "step200")
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert f"error: step150: {run_folder}/step150/config.json" in failed.stderr
    assert [record["name"] for record in records(tmp_path)] == ["step100"], "what was done is kept"
    shutil.copytree(run_folder / "step100", tmp_path / "step100")
    ran = typed(COMMAND, *options, "step200")
    assert ran.returncode == 0, ran.stderr
    first, second = records(tmp_path)
    assert (first["name"], second["name"]) == ("step100", "step200") and first["tokens"] == second["tokens"]
    assert f"step100                  loss {first['loss']:.4f}\n" in ran.stdout
    assert (tmp_path / "history.png").read_bytes().startswith(PNG)
    model, tokenizer = backends.get(backend).load(run_folder / "step200", "float32")
    total, count = 0.0, 0
    for text in perplexity.read_texts(run_folder / "text.jsonl"):
        ids = tokenizer.encode(text)
        for start in range(1, len(ids), 15):
            row = np.array([[tokenizer.bos_token_id, *ids[start : start + 15]]])
            total += parity.mean_loss(np.asarray(model(row)), row) * (row.size - 1)
            count += row.size - 1
    assert second["tokens"] == count and second["loss"] == pytest.approx(total / count, abs=1e-5)


def test_windows_predict_each_token_once():
    ids = list(range(1, 24))
    for bos in (1, None):
        rows = list(perplexity.windows(ids, 8, bos))
        assert [i for row in rows for i in row[1:]] == ids[1:] and all(len(row) <= 8 for row in rows)
        assert [row[0] for row in rows] == ([1, 1, 1, 1] if bos else [1, 8, 15, 22])
    assert list(perplexity.windows([1], 8, 1)) == []
    ((whole, labels), (rest, _)) = perplexity.batches([[1, 2, 3], [1, 4], [1, 5]], 4, 2)
    assert whole.tolist() == [[1, 2, 3, 0], [1, 4, 0, 0]] and labels.tolist() == [[1, 2, 3, -100], [1, 4, -100, -100]]
    assert rest.shape == whole.shape


def options(tmp_path, **changes):
    return history.Options(**{"backend": "mlx", "save_path": tmp_path, "folders": ("pico",), "limit": 5, **changes})


def test_questions_and_pass_keys(backend, tmp_path, monkeypatch):
    history.main(options(tmp_path, backend=backend))
    history.main(options(tmp_path, backend=backend, evaluation="passkey", max_seq_length=150, num_samples=2))
    questions, keys = records(tmp_path)
    assert questions["score"] > 0.5 and questions["kinds"]["sum"] == 1 and keys["score"] == 0
    assert (questions["name"], questions["limit"], keys["length"]) == ("pico", 5, 150)
    assert "length" not in questions and "limit" not in keys
    (tmp_path / "history.png").unlink()
    monkeypatch.setattr(history, "load_model", None)  # nothing is left to be run
    history.main(options(tmp_path, backend=backend))
    assert (tmp_path / "history.png").exists() and len(records(tmp_path)) == 2
    with pytest.raises(TypeError):
        history.main(options(tmp_path, backend=backend, seed=1))


def test_a_line_that_was_cut_is_measured_again(tmp_path):
    history.main(options(tmp_path))
    kept = tmp_path / "history.jsonl"
    kept.write_text(kept.read_text()[:40])
    history.main(options(tmp_path))
    assert json.loads(kept.read_text().splitlines()[-1])["name"] == "pico"


def test_what_revisions_and_folders_name(tmp_path):
    def listed(**changes):
        return [(c.model, c.revision) for c in history.checkpoints(options(tmp_path, **changes))]

    assert listed(folders=("a", "b")) == [("a", None), ("b", None)]
    assert listed(folders=("a",), model="o/n", revision="r") == [("o/n/a", "r")]
    assert listed(folders=("a",), model="minicpm-2b-history") == [("openbmb/MiniCPM-2B-history/a", None)]
    assert listed(folders=(), revisions=("x", "y"), model="o/n") == [("o/n", "x"), ("o/n", "y")]
    for wrong in (
        {"folders": ()},
        {"revisions": ("x",), "model": "o/n"},
        {"folders": (), "revisions": ("x",)},
        {"folders": (), "revisions": ("x",), "model": "o/n", "revision": "x"},
        {"folders": ("a", "a")},
    ):
        with pytest.raises(InputError):
            listed(**wrong)


def test_steps_are_the_numbers_in_the_names():
    assert curves.steps(["step10000", "step_9000-2b7"]) == [10000, 7]
    assert curves.steps(["2b/step-1000", "2b/step-500"]) == [1000, 500]
    assert curves.steps(["step1", "last"]) is None and curves.steps(["a1", "b1"]) is None


def test_pictures(tmp_path):
    for name, values in (("steps", {"step20": 2.0, "step10": 3.0}), ("order", {"first": 2.0, "last": 1.0})):
        curves.draw(tmp_path / f"{name}.png", values, "loss")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": "loss"}, "evaluation loss and data go together"),
        ({"data": "{text}.txt"}, "evaluation loss and data go together"),
        ({"evaluation": "loss", "data": "{text}.none"}, "text.none does not exist"),
        ({"evaluation": "loss", "data": "{text}.txt", "max_seq_length": 1}, "max_seq_length is 1"),
        ({"limit": 0}, "limit is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"folders": ("none/such",)}, "none/such: "),
        ({"evaluation": "passkey", "max_seq_length": 20}, "pico: 20 tokens are too few"),
    ],
)
def test_wrong_calls_leave_nothing(run_folder, tmp_path, monkeypatch, changes, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    filled = dict(changes)
    if "data" in filled:
        filled["data"] = run_folder / filled["data"].format(text="text")
    with pytest.raises(InputError) as caught:
        history.main(options(tmp_path / "new" / "out", **filled))
    assert said in str(caught.value)
    assert not (tmp_path / "new").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError):
        history.main(options(tmp_path / "out", **filled))
    assert (tmp_path / "out").exists()  # which was there before


def test_texts(run_folder, tmp_path):
    assert len(perplexity.read_texts(run_folder / "text.jsonl")) == 3
    assert perplexity.read_texts(run_folder / "text.txt")[0].startswith("The quick")
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match="line 1: it has the keys prompt"):
        perplexity.read_texts(tmp_path / "wrong.jsonl")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        perplexity.read_texts(built_in() / "model.safetensors")
