"""A small task: the built-in model learns to see, and answers questions about images that are drawn here.

    python -m minicpm_data.image_exercise --save-path images

writes ``start``, the built-in model behind a tower and a resampler with random weights, in the layout of MiniCPM-V 2.0,
and the data to train it on: ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` of {"messages", "images"}. Every image
is drawn anew, at random places, in random sizes and shades.
"""

import base64
import dataclasses
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from weights_io import command_line
from weights_io.built_in import built_in
from weights_io.checkpoint import open_checkpoint
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.partial import partial
from weights_io.parameters import CONSTANTS, EMBEDDING, parameters
from weights_io.vision.config import VisionConfig
from weights_io.write import check_output, folder_to_fill, save_checkpoint

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

SIDE = 56  # pixels of an image that is not cut, and of a slice
VISION = VisionConfig(
    variant="minicpm-v-2",
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    patch_size=14,
    image_size=SIDE,
    position_grid=4,
    num_queries=16,
    text_hidden_size=128,
    slice_mode=True,
    max_slices=4,
    scale_resolution=SIDE,
)
TOKENS = ("<image>", "</image>", "<ref>", "</ref>", "<box>", "</box>", "<slice>", "</slice>")
HIGH, SHARPNESS, CONTENT, PATCH_SCALE, LOUDNESS = 4, 8.0, 0.3, 0.4, 9.0  # of `_looking`
COLORS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (235, 205, 40),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1), "center": (0.5, 0.5)}
# The segments of a digit: top, upper left, upper right, middle, lower left, lower right, bottom.
SEGMENTS = (
    "1110111",
    "0010010",
    "1011101",
    "1011011",
    "0111010",
    "1101011",
    "1101111",
    "1010010",
    "1111111",
    "1111011",
)
Answered = tuple["Image.Image", str, str]  # image, question, answer


@dataclass(frozen=True)
class Options:
    save_path: Path
    """Folder to write."""
    examples: int = 60_000
    """Training images. The test set has 500, the validation set 100."""
    seed: int = 0
    """Seed of the images."""


def image_exercise(options: Options) -> None:
    """Write a small fine-tuning task: questions about drawn shapes, colors, counts, digits and places."""
    if not 100 <= options.examples <= 1_000_000:
        raise InputError(f"is {options.examples}; it must be from 100 to 1000000.", option="examples")
    out = check_output(options.save_path)
    splits = {"train": options.examples, "valid": 100, "test": 500}
    with folder_to_fill(out.parent), partial(out, folder=True) as folder:
        write_start(folder / "start", options.seed)
        for name, number in splits.items():
            random = Random(f"{options.seed} images {name}")
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for _ in range(number):
                    file.write(json.dumps(conversation(random), ensure_ascii=False) + "\n")
            print(f"{options.save_path / name}.jsonl: {number} images")


def write_start(folder: Path, seed: int) -> None:
    """Write the built-in model behind a tower and a resampler with random weights, and with the tokens of images."""
    source = open_checkpoint(built_in())
    first = source.config.vocab_size
    config = dataclasses.replace(
        source.config,
        model_type="minicpmv",
        vision=dataclasses.replace(VISION, text_hidden_size=source.config.hidden_size),
        vocab_size=first + len(TOKENS),
    )
    save_checkpoint(folder, config, _start_tensors(config, source, seed), dtype="float32", raw_config=source.raw_config)
    settings = json.loads((source.path / "tokenizer_config.json").read_text("utf-8"))
    settings.pop("chat_template")  # MiniCPM-V's is the default of a model that sees
    tokenizer = json.loads((source.path / "tokenizer.json").read_text("utf-8"))
    plain = {"special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    tokenizer["added_tokens"] += [{"id": first + i, "content": token, **plain} for i, token in enumerate(TOKENS)]
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _start_tensors(config: ModelConfig, source: Any, seed: int) -> dict[str, Any]:
    """The tensors of the start, by Hugging Face names: those of the built-in model, random ones, and `_looking`."""
    from weights_io.write import Computed

    assert config.vision is not None
    random, looking = np.random.default_rng(seed), _looking(config.vision)
    found = {}
    for parameter in parameters(config):
        shape = parameter.tensor_shape(config)
        for name in parameter.hf_names(config):
            if parameter.init in CONSTANTS:
                array = np.full(shape, CONSTANTS[parameter.init], np.float32)
            else:
                array = random.normal(0, parameter.init_std(config), shape).astype(np.float32)
            if not parameter.of_vision:
                known = source.tensors[name].read().astype(np.float32)
                array = np.concatenate([known, array[len(known) :]]) if name == EMBEDDING.hf_name else known
            found[name] = Computed.of(looking.get(name, lambda array: array)(array))
    return found


def _looking(vision: VisionConfig) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Changes of random weights with which each query looks at its own part of an image, and image tokens are as large
    as those of a text. Training alone finds them late: the positions of neighbors differ only in the few highest
    frequencies, and tokens a tenth as large as the others are drowned by the first layers."""
    from minicpm_data.images.positions import sincos

    width, grid = vision.text_hidden_size, math.isqrt(vision.num_queries)
    own, high = vision.position_grid, np.arange(width) % (width // 4) < HIGH  # of each sine and cosine
    sharp = np.diag(np.where(high, SHARPNESS, 0.0)).astype(np.float32)

    def projections(array: np.ndarray) -> np.ndarray:
        return np.concatenate([sharp, sharp, array[2 * width :]])

    return {
        "vpm.pos_embed": lambda array: sincos(own, own, vision.hidden_size)[None],
        "vpm.patch_embed.proj.weight": lambda array: array * PATCH_SCALE,
        "resampler.pos_embed": lambda array: sincos(grid, grid, width),
        "resampler.attn.in_proj_weight": projections,
        "resampler.ln_q.weight": lambda array: array * 0,
        "resampler.ln_kv.weight": lambda array: array * CONTENT,
        "resampler.proj": lambda array: array * LOUDNESS,
    }


def conversation(random: Random) -> dict[str, Any]:
    """An image with a question and its answer."""
    image, question, answer = random.choice(KINDS)(random)
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    messages = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [url]}


def asked_shape(random: Random) -> Answered:
    shape, color = random.choice(SHAPES), random.choice([*COLORS])
    return one_thing(random, shape, color), "What shape is it?", f"A {shape}."


def asked_color(random: Random) -> Answered:
    shape, color = random.choice(SHAPES), random.choice([*COLORS])
    return one_thing(random, shape, color), "What color is it?", f"{color.capitalize()}."


def asked_both(random: Random) -> Answered:
    shape, color = random.choice(SHAPES), random.choice([*COLORS])
    return one_thing(random, shape, color), "What is in the image?", f"A {color} {shape}."


def asked_count(random: Random) -> Answered:
    """One to four dots, one in each of the chosen quarters of the image."""
    count, color = random.randint(1, 4), random.choice([*COLORS])
    image, draw = canvas(random, SIDE)
    for quarter in random.sample(range(4), count):
        x, y = (SIDE // 4 + SIDE // 2 * part + random.randint(-4, 4) for part in divmod(quarter, 2))
        draw_shape(draw, "circle", x, y, random.randint(5, 8), shade(random, color))
    return image, "How many dots are there?", f"{count}."


def asked_digit(random: Random) -> Answered:
    digit, color = random.randint(0, 9), random.choice([*COLORS])
    image, draw = canvas(random, SIDE)
    draw_digit(draw, digit, random.randint(8, 24), random.randint(5, 15), random.randint(16, 20), shade(random, color))
    return image, "Which digit is it?", f"{digit}."


def asked_place(random: Random) -> Answered:
    shape, place = random.choice(SHAPES), random.choice([*PLACES])
    image, draw = canvas(random, SIDE)
    x, y = (round(13 + 30 * part) + random.randint(-3, 3) for part in PLACES[place])
    draw_shape(draw, shape, x, y, random.randint(6, 9), shade(random, random.choice([*COLORS])))
    return image, "Where is it?", f"In the {place}." if place != "center" else "In the center."


def asked_side(random: Random) -> Answered:
    """Two things side by side: the image is cut into two slices."""
    things = [(random.choice(SHAPES), random.choice([*COLORS])) for _ in range(2)]
    image, draw = canvas(random, 2 * SIDE)
    for side, (shape, color) in enumerate(things):
        x, y = SIDE // 2 + SIDE * side + random.randint(-6, 6), SIDE // 2 + random.randint(-6, 6)
        draw_shape(draw, shape, x, y, random.randint(12, 18), shade(random, color))
    side = random.randint(0, 1)
    shape, color = things[side]
    return image, f"What is on the {('left', 'right')[side]}?", f"A {color} {shape}."


KINDS: tuple[Callable[[Random], Answered], ...] = (
    *(asked_shape, asked_color, asked_both, asked_count, asked_digit, asked_place, asked_side),
)


def one_thing(random: Random, shape: str, color: str) -> "Image.Image":
    """A shape of any size at any place."""
    image, draw = canvas(random, SIDE)
    radius = random.randint(10, 20)
    x, y = (random.randint(radius + 2, SIDE - radius - 2) for _ in range(2))
    draw_shape(draw, shape, x, y, radius, shade(random, color))
    return image


def canvas(random: Random, width: int) -> "tuple[Image.Image, ImageDraw.ImageDraw]":
    """A light image of a random shade."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, SIDE), tuple(random.randint(225, 255) for _ in range(3)))
    return image, ImageDraw.Draw(image)


def shade(random: Random, color: str) -> tuple[int, ...]:
    """A color, a little lighter or darker."""
    change = random.randint(-15, 15)
    return tuple(min(255, max(0, part + change)) for part in COLORS[color])


def draw_shape(draw: "ImageDraw.ImageDraw", shape: str, x: int, y: int, radius: int, color: tuple[int, ...]) -> None:
    """Draw a shape around (x, y)."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=color)
    elif shape == "ring":
        draw.ellipse(box, outline=color, width=max(2, radius // 4))
    else:
        arm = max(1, radius // 3)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=color)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=color)


def draw_digit(draw: "ImageDraw.ImageDraw", digit: int, x: int, y: int, size: int, color: tuple[int, ...]) -> None:
    """Draw a digit of seven segments with its upper left corner at (x, y), 2 ``size`` high."""
    top, middle, bottom, right = y, y + size, y + 2 * size, x + size
    lines = (
        (x, top, right, top),
        (x, top, x, middle),
        (right, top, right, middle),
        (x, middle, right, middle),
        (x, middle, x, bottom),
        (right, middle, right, bottom),
        (x, bottom, right, bottom),
    )
    for line, there in zip(lines, SEGMENTS[digit], strict=True):
        if there == "1":
            draw.line(line, fill=color, width=4)


if __name__ == "__main__":
    command_line.run(image_exercise, Options, "python -m minicpm_data.image_exercise")
