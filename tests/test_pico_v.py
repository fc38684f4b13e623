"""`pico-v`, the built-in model that was taught to see: on images that are in none of its training data."""

import io
from random import Random

import pytest
from documented_commands import typed

from minicpm_data.conversation.messages import with_images
from minicpm_data.generation.image_prompt import chat_prompt
from minicpm_data.image_exercise import KINDS
from minicpm_serve import backends
from weights_io.built_in import built_in

EACH = 12  # images of a kind
SAID: dict[str, list[str]] = {}  # backend -> its answers, which are compared


def drawn():
    return [kind(Random(f"test {kind.__name__} {number}")) for kind in KINDS for number in range(EACH)]


def test_it_is_part_of_the_package():
    assert sum(path.stat().st_size for path in built_in("pico-v").iterdir()) < 4_000_000


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_nine_of_ten_questions_about_unseen_images_are_answered(backend):
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[backend])
    found = backends.get(backend)
    model, tokenizer = found.load("pico-v", dtype="float32")
    asked = drawn()
    prompts = [
        chat_prompt(tokenizer, model.config, [{"role": "user", "content": with_images(question, [image])}])
        for image, question, _ in asked
    ]
    rows = found.generator.batch_generate(model, tokenizer, prompts, max_tokens=16)
    said = ["".join(response.text for response in row).strip() for row in rows]
    right = [reply == answer for reply, (_, _, answer) in zip(said, asked, strict=True)]
    by_kind = {kind.__name__: sum(right[i * EACH : (i + 1) * EACH]) for i, kind in enumerate(KINDS)}
    assert sum(right) >= 0.9 * len(right), by_kind
    SAID[backend] = said
    assert all(other == said for other in SAID.values())  # greedy answers of both backends are equal


def test_it_answers_on_the_command_line(tmp_path):
    image, question, answer = KINDS[1](Random("a color"))
    file = io.BytesIO()
    image.save(file, "PNG")
    (tmp_path / "drawn.png").write_bytes(file.getvalue())
    done = typed("minicpm_mlx.generate", "--model", "pico-v", "--image", tmp_path / "drawn.png", "--prompt", question)
    assert done.returncode == 0 and done.stdout.strip() == answer


def test_a_file_of_images_is_evaluated(tmp_path):
    done = typed("minicpm_data.image_exercise", "--save-path", tmp_path / "images", "--examples", 100)
    assert done.returncode == 0 and (tmp_path / "images" / "start" / "model.safetensors").exists()
    given = ("--model", "pico-v", "--data", tmp_path / "images" / "test.jsonl", "--limit", 20)
    done = typed("minicpm_jax.evaluate", *given, "--require", "exact=80")
    assert done.returncode == 0, done.stdout + done.stderr
    done = typed("minicpm_data.image_exercise", "--save-path", tmp_path / "x", "--examples", 3)
    assert done.returncode == 2 and "--examples is 3" in done.stderr and not (tmp_path / "x").exists()
