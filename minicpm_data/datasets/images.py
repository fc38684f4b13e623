"""Images of training data: where a line names them, and where they stand in its messages.

LLaMA-Factory and TRL give a list ``images``, OpenBMB's finetune/dataset.py one ``image`` or an object that names each.
A tag ``<image>`` in a question (or the name, or a part ``{"type": "image"}``) is the place of an image. Without tags
the images come before the first question.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from minicpm_data.conversation.messages import IMAGE_PARTS
from minicpm_data.datasets.turns import Named, Turn, messages_of
from minicpm_data.images.conversation import IMAGE
from minicpm_data.images.opening import Source, is_path
from minicpm_data.images.processing import ProcessedImage, process
from minicpm_data.images.tags import TAG, with_parts
from minicpm_data.keys import as_json, few, says_nothing
from weights_io.errors import InputError, short
from weights_io.vision.config import VisionConfig

KEYS = ("images", "image")
PIXELS, PLACES = "pixels_", "places_"  # before a size, in the arrays of a training step
MESSAGES = ("history", "messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected")
REPEATED_TAG = re.compile(
    r"^(?:<image>\n?)+|(?:\n?<image>)+$"
)  # images before and after a text, with their line breaks


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image of an example, without its pixels.

    Attributes:
        source: a path or a ``data:`` URL.
        tokens: of all parts in a prompt.
        digest: of its pixels.
        vision, max_slices: how it is processed.
    """

    source: Source
    tokens: int
    digest: bytes
    vision: VisionConfig
    max_slices: int | None = None

    def load(self) -> ProcessedImage:
        """The image with its pixels. Raises `InputError` where it cannot be read, or has changed."""
        image = process(self.source, self.vision, self.max_slices)
        if image.digest != self.digest:
            raise InputError(f"{short(str(self.source))} has changed since the training began; restore it.")
        return image


@dataclass(frozen=True)
class ImageData:
    """How the images of training data are read.

    Attributes:
        vision: of the model.
        folder: of the data; paths are relative to it.
        max_slices: most slices of an image; None: the model's own number.
    """

    vision: VisionConfig
    folder: Path
    max_slices: int | None = None

    def source(self, value: Any) -> Source:
        """The source of an image of a line. Raises `InputError`."""
        if not isinstance(value, str) or not value:
            raise InputError(f"it has the image {as_json(value)}; give the path of a file.")
        return str(self.folder / Path(value).expanduser()) if is_path(value) and "://" not in value else value

    def taken(self, document: Mapping[str, Any]) -> tuple[Named, dict[str, Any]]:
        """The images of a document, and the document with tags in place of parts of type image. Raises `InputError`."""
        given = [key for key in KEYS if not says_nothing(document.get(key))]
        if len(given) > 1:
            raise InputError(f"it has {few(given)}; keep one of them.")
        rest = {key: value for key, value in document.items() if key not in KEYS}
        value = document[given[0]] if given else []
        if isinstance(value, Mapping):  # OpenBMB's: tag -> path
            if TAG in value or any(not isinstance(tag, str) or not tag for tag in value):
                raise InputError(f'it has an "{given[0]}" whose names are no tags such as <image_00>; correct them.')
            return Named(tuple(map(self.source, value.values())), tuple(value)), rest
        listed = [self.source(item) for item in (value if isinstance(value, list) else [value])]
        parts = [*_image_parts(rest)]
        if not parts:
            return Named(tuple(listed)), rest
        if any(TAG in text for text in _texts(rest)):
            raise InputError(f"it has both tags {TAG} and parts of type image; keep one of the two.")
        own = [_own_source(part) for part in parts]
        waiting = iter(listed)
        sources = [next(waiting, None) if item is None else self.source(item) for item in own]
        if own.count(None) != len(listed):
            raise InputError(
                f"it has {own.count(None)} parts of type image without a file and {len(listed)} images; there must be "
                "one for each."
            )
        return Named(tuple(sources)), _with_tags(rest)

    def messages(self, turns: Sequence[Turn], named: Named) -> tuple[list[dict[str, Any]], tuple[Source, ...]]:
        """The messages of turns, with parts of type image in place of the tags, and the images. Raises `InputError`."""
        turns, sources = _one_tag(turns, named)
        if wrong := next((turn.role for turn in turns if turn.role != "user" and TAG in turn.content), None):
            raise InputError(f"it has a tag {TAG} in a message of the role {wrong}; only users send images.")
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
        if sources and not any(TAG in turn.content for turn in turns):
            if first is None:
                raise InputError("it has an image and no question; add a message of the user.")
            turns = [
                replace(turn, content=f"{TAG}\n" * len(sources) + turn.content) if i == first else turn
                for i, turn in enumerate(turns)
            ]
        if self.vision.variant != "omnilmm":  # the images stand before the text, each with a line break after it
            turns = [replace(turn, content=REPEATED_TAG.sub(_bare, turn.content)) for turn in turns]
        return with_parts(messages_of(turns), sources, "it"), sources

    def stored(self, source: Source, image: ProcessedImage) -> StoredImage:
        return StoredImage(source, image.tokens, image.digest, self.vision, self.max_slices)


def _bare(found: re.Match[str]) -> str:
    return found[0].replace("\n", "")


def _one_tag(turns: Sequence[Turn], named: Named) -> tuple[list[Turn], tuple[Source, ...]]:
    """The turns with `TAG` in place of each name, and the sources in the order of their places."""
    turns = list(turns)
    if not named.names:
        return turns, named.sources
    if any(TAG in turn.content for turn in turns):
        raise InputError(f"it has tags {TAG} beside images with names; keep one of the two.")
    tags = re.compile("|".join(map(re.escape, sorted(named.names, key=len, reverse=True))))
    found = [tag for turn in turns for tag in tags.findall(turn.content)]
    if found and (missing := [tag for tag in named.names if tag not in found]):
        raise InputError(f"it has the images {few(missing)}, whose tags are in no message; add them.")
    by_name = dict(zip(named.names, named.sources, strict=True))
    order = tuple(by_name[tag] for tag in found) if found else named.sources
    return [replace(turn, content=tags.sub(TAG, turn.content)) for turn in turns], order


def _contents(document: Mapping[str, Any]) -> Iterator[Any]:
    """The contents of the messages of a document."""
    for key in MESSAGES:
        value = document.get(key)
        for message in value if isinstance(value, list) else [value]:
            if isinstance(message, Mapping):
                yield message.get("content", message.get("value"))


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS


def _image_parts(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for content in _contents(document):
        yield from filter(_is_image, content if isinstance(content, list) else ())


def _texts(document: Mapping[str, Any]) -> Iterator[str]:
    for content in _contents(document):
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield text


def _own_source(part: Mapping[str, Any]) -> Any:
    """What a part of type image names; None where it is only a place."""
    values = {key: value for key, value in part.items() if key not in ("type", "detail", "text") and value is not None}
    if not values:
        return None
    key, value = next(iter(values.items()))
    if len(values) > 1 or key not in ("image", "path", "url", "image_url"):
        raise InputError(f'it has a part of type {part["type"]} with {few([*values])}; it may have "image".')
    return value.get("url") if isinstance(value, Mapping) else value


def _with_tags(value: Any) -> Any:
    """A JSON value with a text part of `TAG` in place of each part of type image."""
    if _is_image(value):
        return {"type": "text", "text": TAG}
    if isinstance(value, Mapping):
        return {key: _with_tags(item) for key, item in value.items()}
    return [_with_tags(item) for item in value] if isinstance(value, list) else value


def image_arrays(ids: Int[np.ndarray, "B T"], images: Sequence[StoredImage]) -> dict[str, np.ndarray]:
    """The pixels of a batch, for a training step.

    Arguments:
        ids: with `IMAGE` at the tokens of images.
        images: in the order of their tokens, row by row.

    Returns:
        For each size H x W of overviews and slices: ``pixels_HxW`` [P, 3, H, W] float32, and ``places_HxW`` [P, Q]
        int32, the positions of their tokens in the flattened batch. P is a power of two, so that few programs are
        compiled; the positions of parts that pad it are B * T, beyond the batch.
    """
    positions = np.flatnonzero(ids.reshape(-1) == IMAGE).astype(np.int32)
    pixels: dict[str, list[np.ndarray]] = {}
    places: dict[str, list[np.ndarray]] = {}
    at = 0
    for image in images:
        loaded = image.load()
        for part, array in enumerate(loaded.parts):
            size = f"{array.shape[0]}x{array.shape[1]}"
            pixels.setdefault(size, []).append(loaded.pixels(part))
            places.setdefault(size, []).append(positions[at : at + image.vision.num_queries])
            at += image.vision.num_queries
    assert at == len(positions)
    found = {}
    for size, parts in pixels.items():
        missing = (1 << (len(parts) - 1).bit_length()) - len(parts)
        found[f"{PIXELS}{size}"] = np.stack([*parts, *[np.zeros_like(parts[0])] * missing])
        found[f"{PLACES}{size}"] = np.stack([*places[size], *[np.full_like(places[size][0], ids.size)] * missing])
    return found


def sizes_of(arrays: Mapping[str, Any]) -> list[str]:
    """The sizes of the images in the arrays of a training step."""
    return [name.removeprefix(PIXELS) for name in arrays if name.startswith(PIXELS)]


def alike(batches: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The arrays of several batches, those of their images padded to the same sizes and numbers."""
    most: dict[str, np.ndarray] = {}
    for batch in batches:
        for size in sizes_of(batch):
            for name in (f"{PIXELS}{size}", f"{PLACES}{size}"):
                if name not in most or len(most[name]) < len(batch[name]):
                    most[name] = batch[name]
    found = []
    for batch in batches:
        own = dict(batch)
        for name, longest in most.items():
            nothing = 0 if name.startswith(PIXELS) else batch["ids"].size
            rows = own.get(name, longest[:0])
            filling = np.full((len(longest) - len(rows), *longest.shape[1:]), nothing, longest.dtype)
            own[name] = np.concatenate([rows, filling])
        found.append(own)
    return found
