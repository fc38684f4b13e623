"""Training on images, in both backends: tower and resampler run inside the loss, or under adapters of the decoder."""

import json
from random import Random

import numpy as np
import pytest
import safetensors.numpy
from documented_commands import typed

from minicpm_data.datasets.images import alike
from minicpm_data.image_exercise import KINDS, conversation, write_start


@pytest.fixture(scope="module")
def exercise(tmp_path_factory):
    """The start of pico-v, and a few images."""
    folder = tmp_path_factory.mktemp("exercise")
    write_start(folder / "start", 0)
    random = Random("images of a test")
    for name, number in (("train", 12), ("valid", 4)):
        lines = [json.dumps(conversation(random)) for _ in range(number)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module", params=["jax", "mlx"])
def package(request):
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[request.param])
    return f"minicpm_{request.param}"


def test_all_weights_learn_to_see(package, exercise, tmp_path):
    out = tmp_path / "run"
    given = ("--model", exercise / "start", "--data", exercise, "--save-path", out, "--iters", 6, "--batch-size", 4)
    more = ("--learning-rate", "2e-3", "--max-seq-length", 96, "--val-batches", 1, "--grad-accumulation-steps", 2)
    done = typed(f"{package}.finetune", *given, *more, "--seed", 3)
    assert done.returncode == 0, done.stderr
    assert "12 images" in done.stdout and "tokens of an image" in done.stdout
    found = losses(out)
    assert len(found) == 6 and found[-1] < 0.8 * found[0]
    before, after = (
        safetensors.numpy.load_file(folder / "model.safetensors") for folder in (exercise / "start", out / "model")
    )
    assert before.keys() == after.keys() and "llm.model.norm.weight" in after
    moved = [name for name, array in after.items() if not np.array_equal(array, before[name].astype(array.dtype))]
    assert {"vpm.patch_embed.proj.weight", "vpm.blocks.2.mlp.fc1.bias", "resampler.query"} <= {*moved}


def test_both_backends_begin_with_the_same_loss(exercise, tmp_path):
    pytest.importorskip("mlx.core")
    first = []
    for package in ("minicpm_jax", "minicpm_mlx"):
        given = ("--model", exercise / "start", "--data", exercise, "--adapter-path", tmp_path / package, "--iters", 1)
        done = typed(f"{package}.lora", *given, "--batch-size", 4, "--max-seq-length", 96, "--val-batches", 0)
        assert done.returncode == 0, done.stderr
        first.append(losses(tmp_path / package)[0])
        adapter = safetensors.numpy.load_file(tmp_path / package / "adapter_model.safetensors")
        assert adapter and not any("vpm" in name or "resampler" in name for name in adapter)
    assert first[0] == pytest.approx(first[1], abs=1e-4)


def test_batches_with_other_images_become_alike():
    one = {"ids": np.zeros((2, 4), np.int32), "pixels_2x2": np.ones((1, 3, 2, 2)), "places_2x2": np.array([[0, 1]])}
    two = {
        "ids": np.zeros((2, 4), np.int32),
        "pixels_4x2": np.ones((2, 3, 4, 2)),
        "places_4x2": np.array([[4, 5], [6, 7]]),
    }
    found = alike([one, two])
    assert [{name: array.shape for name, array in arrays.items()} for arrays in found][0] == {
        name: array.shape for name, array in found[1].items()
    }
    assert (found[1]["places_2x2"] == 8).all() and (found[1]["pixels_2x2"] == 0).all()  # beyond the batch
    np.testing.assert_array_equal(found[0]["places_2x2"], one["places_2x2"])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_image_is_drawn(kind):
    drawn = [kind(Random(seed)) for seed in range(8)]
    assert len({answer for _, _, answer in drawn}) > 1
    for image, question, answer in drawn:
        assert image.mode == "RGB" and question.endswith("?") and answer.endswith(".")
        assert len({*np.asarray(image).reshape(-1, 3).view("u1").tobytes()}) > 1


def test_an_image_that_is_gone_is_named(package, exercise, tmp_path):
    line = {"messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]}
    (tmp_path / "train.jsonl").write_text(json.dumps({**line, "images": ["gone.png"]}))
    given = ("--model", exercise / "start", "--data", tmp_path, "--adapter-path", tmp_path / "out", "--iters", 1)
    done = typed(f"{package}.lora", *given, "--val-batches", 0)
    assert done.returncode == 2 and "gone.png" in done.stderr and not (tmp_path / "out").exists()
