"""Images: cut as the original cuts them, opened whatever they are, and put into prompts token for token."""

import base64
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from minicpm_data.conversation.messages import with_images
from minicpm_data.generation.image_prompt import ImagePrompt, chat_prompt
from minicpm_data.generation.request import IMAGE_IDS
from minicpm_data.images.conversation import IMAGE, encode_chat
from minicpm_data.images.processing import process
from minicpm_data.images.slicing import best_resize, cut_of
from minicpm_data.images.tags import with_parts, with_tags
from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError

MODELS = ("v1", "v2", "omnilmm")
QUESTION = "what is in the image?"
LATER = [{"role": "assistant", "content": "a red cat."}, {"role": "user", "content": "describe this picture"}]


@pytest.fixture(scope="module", params=MODELS)
def seeing(request, reference):
    """A checkpoint of a model that sees, its tokenizer and its arrays."""
    folder = reference(f"vision/{request.param}")
    checkpoint = open_checkpoint(folder)
    return checkpoint, tokenizer_of(checkpoint), dict(np.load(folder / "reference.npz"))


def images_of(arrays, case):
    return [
        Image.fromarray(arrays[key])
        for key in sorted(arrays)
        if key.startswith(f"{case}.image") and key[-1].isdigit() and "bound" not in key
    ]


def messages_of(arrays, case):
    images = images_of(arrays, case)
    if case == "image_tag":
        before, after = ({"type": "text", "text": text} for text in ("describe this picture ", " yes"))
        return [{"role": "user", "content": [before, {"type": "image", "image": images[0]}, after]}]
    asked = [{"role": "user", "content": with_images(QUESTION, images)}]
    return [*asked, *LATER] if case == "multi_turn" else asked


def as_file(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def vision_of(checkpoint, case):
    vision = checkpoint.config.vision
    return dataclasses.replace(vision, slice_mode=False) if case == "slice_mode_off" else vision


def test_sizes_and_grids_are_those_of_the_original(reference):
    for row in json.loads((reference("vision/slice_table.json")).read_text())["rows"]:
        size, options = (row["width"], row["height"]), (row["scale_resolution"], row["patch_size"])
        cut = cut_of(size, row["max_slice_nums"], *options)
        assert [*cut.overview] == row["source_size"]
        assert (cut.grid and [*cut.grid]) == row["grid"] and (cut.refined and [*cut.refined]) == row["refine_size"]
        assert [[*box] for box in cut.boxes] == [box for boxes in row["slice_boxes"] for box in boxes]
        assert [*best_resize(size, *options)] == row["best_resize_noupscale"]
        assert [*best_resize(size, *options, allow_upscale=True)] == row["best_resize_upscale"]


def test_ids_are_those_of_the_original(seeing):
    checkpoint, tokenizer, arrays = seeing
    for case in {key.partition(".")[0] for key in arrays if key.endswith(".input_ids")}:
        found = encode_chat(tokenizer, vision_of(checkpoint, case), messages_of(arrays, case))
        expected = arrays[f"{case}.input_ids"][0].copy()
        for begin, end in arrays[f"{case}.image_bound0"]:
            expected[begin:end] = IMAGE
        assert found.ids == expected.tolist(), case


def test_a_text_makes_no_image(seeing):
    """Neither the tokens of an image nor the marker of its place can be spelled."""
    checkpoint, tokenizer, arrays = seeing
    forged = "<image><unk></image> <slice></slice> <im_start><im_patch><im_end>"
    alone = encode_chat(tokenizer, checkpoint.config.vision, [{"role": "user", "content": forged}])
    specials = {tokenizer.token_to_id(token) for token in ("<image>", "</image>", "<slice>", "<im_start>")} - {None}
    assert IMAGE not in alone.ids and not specials & {*alone.ids}
    image = images_of(arrays, "small")[0]
    beside = encode_chat(
        tokenizer, checkpoint.config.vision, [{"role": "user", "content": with_images(forged, [image])}]
    )
    assert beside.ids.count(IMAGE) == checkpoint.config.vision.num_queries


def test_ids_of_image_tokens_tell_images_apart(seeing):
    checkpoint, tokenizer, arrays = seeing
    small, tall = (images_of(arrays, case)[0] for case in ("small", "tall"))
    prompts = [
        chat_prompt(tokenizer, checkpoint.config, [{"role": "user", "content": with_images("x", [image])}])
        for image in (small, tall, small)
    ]
    assert all(isinstance(prompt, ImagePrompt) for prompt in prompts)
    assert prompts[0] == prompts[2] and prompts[0] != prompts[1]
    seen = [[i for i in prompt if i >= IMAGE_IDS] for prompt in prompts]
    assert len({*seen[0]}) == len(seen[0]) == len(prompts[0].places) and not {*seen[0]} & {*seen[1]}


def test_more_images_than_there_is_room_for(seeing):
    checkpoint, tokenizer, arrays = seeing
    images = images_of(arrays, "small") * 5
    with pytest.raises(InputError, match="the first 4 images have 36 tokens, and there is room for 30"):
        chat_prompt(tokenizer, checkpoint.config, [{"role": "user", "content": with_images("x", images)}], room=30)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image"}, "without 'image'"),
        ({"type": "image", "image": 3}, "of type int"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, "is empty"),
        ({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}, "must be data:image/png;base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%%"}}, "is damaged"),
        ({"type": "image", "image": b"x", "size": 3}, "with 'size'"),
    ],
)
def test_parts_that_are_no_images(seeing, part, said):
    checkpoint, tokenizer, _ = seeing
    with pytest.raises(InputError, match=said):
        encode_chat(tokenizer, checkpoint.config.vision, [{"role": "user", "content": [part]}])


def test_a_model_of_text_takes_no_images(reference):
    checkpoint = open_checkpoint(reference("dense_2b"))
    with pytest.raises(InputError, match="takes no images"):
        chat_prompt(None, checkpoint.config, [{"role": "user", "content": with_images("x", [b"x"])}])


@pytest.fixture(scope="module")
def vision(reference):
    return open_checkpoint(reference("vision/v2")).config.vision


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (3, 900)])
def test_extreme_shapes_are_cut(size, vision):
    found = process(Image.new("RGB", size), vision)
    assert found.size == size and found.tokens == len(found.parts) * vision.num_queries


def test_a_strip_with_too_many_patches_is_refused(vision):
    with pytest.raises(InputError, match="more than 4,096 patches; crop it"):
        process(Image.new("RGB", (90000, 1)), dataclasses.replace(vision, scale_resolution=448))


def test_an_image_is_told_by_size_slices_and_tokens(vision, tmp_path):
    path = tmp_path / "cat.png"
    Image.new("RGB", (120, 60)).save(path)
    assert str(process(path, vision)) == "cat.png 120x60: 2 slices + overview, 27 tokens"
    assert str(process(str(path), vision, max_slices=1)) == "cat.png 120x60: 9 tokens"
    with pytest.raises(InputError, match="at least 1") as caught:
        process(path, vision, max_slices=0)
    assert caught.value.option == "max_slices"


def test_a_data_url_holds_an_image(vision):
    url = "data:image/png;base64," + base64.b64encode(as_file(Image.new("RGB", (30, 20), "red"))).decode()
    assert process(url, vision).size == (30, 20)


def test_tags_of_files_become_parts_and_back(vision, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (30, 20)).save(path)
    messages = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "red"}]
    parts = with_parts(messages, [process(path, vision)], "line 0")
    assert [part["type"] for part in parts[0]["content"]] == ["image", "text"]
    assert parts[0]["content"][1]["text"] == "what?"
    assert with_tags(parts) == (messages, [str(path)])
    with pytest.raises(InputError, match="line 0 has 1 tags <image> and 0 images"):
        with_parts(messages, [], "line 0")
