"""Training data with images: each form that names them, and the examples, rows and pixels that it becomes."""

import json

import numpy as np
import pytest
from PIL import Image

from minicpm_data.datasets.batches import Batches
from minicpm_data.datasets.examples import load_split, make_example, show_first
from minicpm_data.datasets.formats import Reader
from minicpm_data.datasets.images import ImageData
from minicpm_data.images.conversation import IMAGE, encode_chat
from minicpm_data.images.processing import process
from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError

QUESTION, ANSWER = "what is in the image?", "a red cat."


@pytest.fixture(scope="module")
def seeing(reference):
    """The vision config and the tokenizer of a model."""

    def of(name):
        checkpoint = open_checkpoint(reference(f"vision/{name}"))
        return checkpoint.config.vision, tokenizer_of(checkpoint)

    return of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small image and one that is cut."""
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    Image.new("RGB", (120, 60), "blue").save(folder / "b.png")
    return folder


def user(content):
    return {"role": "user", "content": content}


def answer(content=ANSWER):
    return {"role": "assistant", "content": content}


def place(**source):
    return {"type": "image", **source}


def text(words):
    return {"type": "text", "text": words}


AFTER = [text(QUESTION)]
FORMS = {
    "LLaMA-Factory": {"messages": [user(f"<image>{QUESTION}"), answer()], "images": ["a.png"]},
    "LLaMA-Factory's ShareGPT": {
        "conversations": [{"from": "human", "value": f"<image>{QUESTION}"}, {"from": "gpt", "value": ANSWER}],
        "images": ["a.png"],
    },
    "LLaMA-Factory's Alpaca": {"instruction": QUESTION, "output": ANSWER, "images": ["a.png"]},
    "OpenBMB": {"id": "0", "image": "a.png", "conversations": [user(f"<image>\n{QUESTION}"), answer()]},
    "OpenBMB without a tag": {"id": "0", "image": "a.png", "conversations": [user(QUESTION), answer()]},
    "OpenBMB with names": {
        "image": {"<image_00>": "a.png"},
        "conversations": [user(f"<image_00>\n{QUESTION}"), answer()],
    },
    "LLaVA": {"image": "a.png", "messages": [user(f"{QUESTION}\n<image>"), answer()]},
    "TRL": {"messages": [user([place(), *AFTER]), answer([text(ANSWER)])], "images": ["a.png"]},
    "TRL's prompt": {"prompt": [user([place(), *AFTER])], "completion": [answer()], "images": ["a.png"]},
    "parts with files": {"messages": [user([place(image="a.png"), *AFTER]), answer()]},
    "OpenAI": {"messages": [user([{"type": "image_url", "image_url": {"url": "a.png"}}, *AFTER]), answer()]},
    "a list of one": {"messages": [user(QUESTION), answer()], "images": "a.png"},
}


# OmniLMM takes an image in its place, which is after the question in LLaVA's line.
@pytest.mark.parametrize(
    ("form", "model"),
    [(form, model) for form in FORMS for model in ("v1", "v2", "omnilmm") if (form, model) != ("LLaVA", "omnilmm")],
)
def test_an_example_is_the_prompt_of_chat_and_the_answer(form, model, seeing, folder):
    vision, tokenizer = seeing(model)
    example = make_example(FORMS[form], tokenizer, reader=Reader(images=ImageData(vision, folder)))
    prompt = encode_chat(tokenizer, vision, [user([place(image=str(folder / "a.png")), *AFTER])]).ids
    assert example.ids[: len(prompt)].tolist() == prompt
    assert not example.trained[: len(prompt)].any() and example.trained[len(prompt) :].all()
    assert tokenizer.decode(example.ids[len(prompt) :]).strip() == ANSWER
    assert [image.load().size for image in example.images] == [(30, 20)]


def test_images_of_several_questions(seeing, folder):
    vision, tokenizer = seeing("v2")
    reader = Reader(images=ImageData(vision, folder))
    example = make_example(
        {
            "messages": [user("<image>x"), answer("a"), user("<image><image>\ny<image>"), answer("b")],
            "images": ["a.png", "b.png", "a.png", "a.png"],
        },
        tokenizer,
        reader=reader,
    )
    small, cut = (process(folder / name, vision).tokens for name in ("a.png", "b.png"))
    assert [image.tokens for image in example.images] == [small, cut, small, small] and cut > small
    assert (example.ids == IMAGE).sum() == 3 * small + cut
    named = {"image": {"<image_00>": "a.png", "<image_01>": "b.png"}}
    swapped = make_example(
        {**named, "messages": [user("<image_01><image_00>x"), answer("a")]}, tokenizer, reader=reader
    )
    assert [image.load().size for image in swapped.images] == [(120, 60), (30, 20)]
    in_place = seeing("omnilmm")
    example = make_example(
        {"messages": [user("x <image> y"), answer()], "images": ["a.png"]},
        in_place[1],
        reader=Reader(images=ImageData(in_place[0], folder)),
    )
    asked = [text("x "), place(image=str(folder / "a.png")), text(" y")]
    prompt = encode_chat(in_place[1], in_place[0], [user(asked)]).ids
    assert example.ids[: len(prompt)].tolist() == prompt


WRONG = {
    "more tags": ({"messages": [user("<image><image>x"), answer()], "images": ["a.png"]}, "2 tags <image> and 1"),
    "more images": ({"messages": [user("<image>x"), answer()], "images": ["a.png", "b.png"]}, "1 tags <image> and 2"),
    "no image": ({"messages": [user("<image>x"), answer()]}, "1 tags <image> and 0"),
    "in an answer": ({"messages": [user("x"), answer("<image>")], "images": ["a.png"]}, "role assistant"),
    "no question": ({"messages": [answer()], "images": ["a.png"]}, "no question"),
    "after the answers": (
        {"messages": [user("x"), answer(), user("<image>y")], "images": ["a.png"]},
        "after the last answer",
    ),
    "both keys": ({"messages": [user("x"), answer()], "images": ["a.png"], "image": "b.png"}, '"images" and "image"'),
    "tags and parts": ({"messages": [user([place(image="a.png"), text("<image>")]), answer()]}, "keep one of the two"),
    "fewer places": ({"messages": [user([place(), *AFTER]), answer()], "images": ["a.png", "b.png"]}, "1 parts"),
    "an unknown part": ({"messages": [user([place(image="a.png", crop=3), *AFTER]), answer()]}, '"crop"'),
    "a name without a tag": (
        {"image": {"<image_00>": "a.png", "<image_01>": "b.png"}, "messages": [user("<image_00>x"), answer()]},
        '"<image_01>"',
    ),
    "a text": ({"text": "x", "images": ["a.png"]}, 'beside a "text"'),
    "a number": ({"messages": [user("x"), answer()], "images": [3]}, "the image 3"),
    "no file": ({"messages": [user("x"), answer()], "images": ["none.png"]}, "none.png"),
    "a URL": ({"messages": [user("x"), answer()], "images": ["https://example.org/a.png"]}, "download"),
    "a video": ({"messages": [user("x"), answer()], "videos": ["a.mp4"]}, '"videos"'),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_unclear_is_refused(name, seeing, folder):
    vision, tokenizer = seeing("v2")
    document, why = WRONG[name]
    with pytest.raises(InputError, match=why) as raised:
        make_example(document, tokenizer, reader=Reader(images=ImageData(vision, folder)))
    assert "\n" not in str(raised.value)


def test_a_model_of_text_refuses_images(seeing, folder):
    with pytest.raises(InputError, match="images"):
        make_example(FORMS["LLaMA-Factory"], seeing("v2")[1])


def test_a_window_cuts_no_image(seeing, folder, tmp_path):
    vision, tokenizer = seeing("v2")
    document = {"messages": [user("<image>x"), answer("a"), user("<image>y"), answer("b")], "images": ["a.png"] * 2}
    (folder / "two.jsonl").write_text(json.dumps(document))
    whole = load_split(folder / "two.jsonl", "train", tokenizer, 1000, vision=vision).examples[0]
    second = int(np.flatnonzero(whole.ids == IMAGE)[vision.num_queries])
    for width in range(second - 3, second + vision.num_queries + 2):
        (part,) = load_split(folder / "two.jsonl", "train", tokenizer, width, vision=vision).examples
        fits = width >= second + vision.num_queries
        assert len(part.images) == 1 + fits and (part.ids == IMAGE).sum() == vision.num_queries * len(part.images)
        assert len(part.ids) == (width if fits else min(width, second - 1))


def test_batches_hold_the_pixels_and_their_places(seeing, folder, capsys):
    vision, tokenizer = seeing("v2")
    lines = [
        {"messages": [user("<image>" * n + QUESTION), answer()], "images": ["b.png", "a.png"][:n]} for n in range(3)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    split = load_split(folder, "train", tokenizer, 512, vision=vision)
    assert "3 images" in split.summary()
    show_first(split, tokenizer)
    assert "tokens of an image" not in capsys.readouterr().out  # the first line has none
    show_first(type(split)(split.path, split.examples[::-1], 0, 0), tokenizer)
    assert f"({vision.num_queries} tokens of an image)" in capsys.readouterr().out
    for pack in (False, True):
        batch = Batches(split.examples, 1 if pack else 3, 512, 0, pack=pack)[0]
        arrays = batch.arrays()
        assert (batch.labels[batch.ids == IMAGE] == -100).all()
        pixels = {name: array for name, array in arrays.items() if name.startswith("pixels_")}
        size = batch.ids.size
        reached = np.concatenate([arrays[name.replace("pixels", "places")].reshape(-1) for name in pixels])
        assert sorted(reached[reached < size]) == np.flatnonzero(batch.ids.reshape(-1) == IMAGE).tolist()
        for name, array in pixels.items():
            places = arrays[name.replace("pixels", "places")]
            assert len(array) == len(places) and len(array).bit_count() == 1
            assert array.shape[1:] == (3, *map(int, name.removeprefix("pixels_").split("x")))
        first = batch.images[0].load()
        at = np.flatnonzero(batch.ids.reshape(-1) == IMAGE)[0]
        name = f"{first.parts[0].shape[0]}x{first.parts[0].shape[1]}"
        (row,) = np.flatnonzero(arrays[f"places_{name}"][:, 0] == at)
        assert np.array_equal(arrays[f"pixels_{name}"][row], first.pixels(0))


def test_an_image_that_changes_is_refused(seeing, tmp_path):
    vision, tokenizer = seeing("v2")
    path = tmp_path / "a.png"
    Image.new("RGB", (30, 20), "red").save(path)
    example = make_example(FORMS["LLaMA-Factory"], tokenizer, reader=Reader(images=ImageData(vision, tmp_path)))
    Image.new("RGB", (30, 20), "blue").save(path)
    with pytest.raises(InputError, match="has changed"):
        example.images[0].load()


def test_pairs_have_the_images_on_both_sides(seeing, folder):
    vision, tokenizer = seeing("v2")
    line = {"prompt": f"<image>{QUESTION}", "chosen": "yes", "rejected": "no", "images": ["a.png"]}
    (folder / "pairs.jsonl").write_text(json.dumps(line))
    split = load_split(folder / "pairs.jsonl", "train", tokenizer, 512, pairs=True, vision=vision)
    batch = Batches(split.examples, 1, 512, 0)[0]
    assert len(batch.images) == 2 and (batch.ids == IMAGE).sum(1).tolist() == [vision.num_queries] * 2
