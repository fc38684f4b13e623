"""The regions that an answer names, as the maintainers of MiniCPM-V describe them."""

import json

import pytest
import tiny_tokenizer as tiny
from PIL import Image, ImageChops

from minicpm_data import load_tokenizer
from minicpm_data.conversation.regions import REGION_TAGS, Region, regions, without_tags
from minicpm_data.generation.responses import Response
from minicpm_data.images.drawing import draw
from minicpm_serve.http.answers import Answer, message_choice, message_pieces
from minicpm_serve.http.schemas import Message

BOX = "<box>120 80 640 910</box>"


@pytest.mark.parametrize(
    "text, kind, points",
    [
        (BOX, "box", ((120, 80), (640, 910))),
        ("<box>640 910 120 80</box>", "box", ((120, 80), (640, 910))),
        ("<box>(120,80),(640,910)</box>", "box", ((120, 80), (640, 910))),
        ("<box>[[120, 80, 640, 910]]</box>", "box", ((120, 80), (640, 910))),
        ("<point>0 1000</point>", "point", ((0, 1000),)),
        ("<quad>1 2 9 3 8 7 2 6</quad>", "quad", ((1, 2), (9, 3), (8, 7), (2, 6))),
    ],
)
def test_coordinates(text, kind, points):
    assert regions(f"See {text}.") == [Region(kind, points, "", 4, 4 + len(text))]


def test_a_label_belongs_to_the_regions_that_follow_it():
    answer = f"<ref>a\ncat</ref>{BOX}, <point>1 2</point> and <point>3 4</point> <ref>x < y</ref>: <point>5 6</point>"
    assert [region.label for region in regions(answer)] == ["a cat", "a cat", "", "x < y"]
    assert without_tags(f"It is <ref>a cat</ref>{BOX}.") == "It is a cat."


@pytest.mark.parametrize(
    "text",
    [
        "<box>1 2 3</box>",
        "<box>1 2 3 4 5</box>",
        "<box>1 2 3 1001</box>",
        "<box>-1 2 3 4</box>",
        "<box>0.1 0.2 0.3 0.4</box>",
        "<box>the left</box>",
        "<box></box>",
        "<box>1 2 3 4</quad>",
        "<box>1 2 3 4",
        "<ref>a cat</ref>",
        "<box>" * 50_000,
        "<ref>" * 50_000,
        "<box>" + "1 " * 100_000 + "</box>",
    ],
    ids=lambda text: text[:24],
)
def test_other_tags_are_text(text):
    assert regions(text) == []
    assert without_tags(text) == text.replace("<ref>", "").replace("</ref>", "")


def test_regions_are_drawn_at_their_pixels():
    image = Image.new("RGB", (400, 200), "white")
    (region,) = regions("<box>500 250 750 750</box>")
    assert region.outline(image.size) == [(200, 50), (300, 50), (300, 150), (200, 150)]
    drawn = draw(image, [region])
    assert image.getcolors() == [(80_000, (255, 255, 255))]
    left, top, right, bottom = ImageChops.difference(image, drawn).getbbox()
    assert abs(left - 200) < 4 and abs(top - 50) < 4 and abs(right - 301) < 4 and abs(bottom - 151) < 4
    marked = draw(image, [*regions("<quad>0 0 1000 0 1000 1000 0 1000</quad><point>1000 1000</point>")])
    assert ImageChops.difference(image, marked).getbbox() == (0, 0, 400, 200)


def test_tags_are_tokens_in_questions_and_text_in_answers(tmp_path):
    first = tiny.sentencepiece_model().get_piece_size()
    tokens = {str(first + i): {"content": tag, "special": True} for i, tag in enumerate(["<ref>", "</ref>", "<image>"])}
    tokenizer = load_tokenizer(tiny.write(tmp_path, added_tokens_decoder=tokens))
    question = [{"role": "user", "content": "<ref>a</ref><image>"}]
    assert not {first, first + 1, first + 2} & {*tokenizer.apply_chat(question)}
    tokenizer.treat_as_text(REGION_TAGS)
    ids = tokenizer.apply_chat(question)
    assert [i for i in ids if i >= first] == [first, first + 1]
    assert tokenizer.decode([first, *tokenizer.encode("a", add_bos=False), first + 1, first + 2]) == "<ref> a</ref>"


@pytest.mark.parametrize("of_images", [True, False])
def test_the_server_sends_regions_of_images_beside_the_text(of_images):
    responses = [Response("<ref>a cat</ref><box>1 2", 5), Response(" 3 4</box>", 6), Response("", 2, "stop")]
    answer = Answer(of_images=of_images)
    deltas = [piece["delta"] for response in responses for piece in message_pieces(0, answer, response)]
    wanted = [{"kind": "box", "points": [[1, 2], [3, 4]], "label": "a cat", "start": 16, "end": 34}]
    wanted = wanted if of_images else None
    message = json.loads(json.dumps(message_choice(0, answer)))["message"]
    assert message["content"] == "<ref>a cat</ref><box>1 2 3 4</box>" and message.get("regions") == wanted
    found = [delta["regions"] for delta in json.loads(json.dumps(deltas)) if "regions" in delta]
    assert found == ([wanted] if of_images else [])
    assert deltas[-1] == {}
    assert Message(**message).plain() == {"role": "assistant", "content": message["content"]}
