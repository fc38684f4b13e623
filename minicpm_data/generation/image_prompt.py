"""A prompt with images, and the tokens that a tower and a resampler make of them.

A token of an image has an id from `IMAGE_IDS` on, made of the pixels and of the token's place in the image. So prompts
that begin alike have equal ids, and caches of beginnings need not know of images. The model gets the size of its
vocabulary as the id, and the token itself among the features (`Decoder.embed` of the backends).
"""

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from minicpm_data.conversation.messages import IMAGE_PARTS, Message
from minicpm_data.generation.request import IMAGE_IDS, PromptIds
from minicpm_data.images.conversation import IMAGE, ImageChat, encode_chat
from minicpm_data.images.processing import ProcessedImage
from weights_io.config import ModelConfig
from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer

KEPT_BYTES = 256 << 20  # of the latest images' tokens, for each model
AT_ONCE = 8  # parts of one size that run together; their number is a power of two, so that few programs are compiled


class SeeingModel(Protocol):
    """What is used of a backend's model."""

    def encode_images(self, pixels: Any) -> Any: ...  # [B, 3, H, W] to float32 [B, S, D]


class ImagePrompt(PromptIds):
    """The ids of a prompt with images; `PromptIds` are without.

    Attributes:
        images: in the order of their tokens.
        places: [N] the positions of their tokens.
        penalized: the ids that a repetition penalty counts: the original's generation sees embeddings alone, and counts
            BOS.
    """

    images: tuple[ProcessedImage, ...]
    places: Int[np.ndarray, " N"]
    penalized: tuple[int, ...]

    @classmethod
    def of(cls, chat: ImageChat, vocab_size: int, bos_token_id: int | None) -> "ImagePrompt":
        """The prompt of a conversation. Raises `InputError` as `PromptIds`."""
        ids = np.array(chat.ids, np.int64)
        places = np.flatnonzero(ids == IMAGE)
        ids[places] = 0
        checked = PromptIds(ids.tolist(), vocab_size)
        known = [_known_ids(image) for image in chat.images]
        ids[places] = np.concatenate(known) if known else []
        made = tuple.__new__(cls, map(int, ids) if known else checked)
        made.images, made.places = chat.images, places
        made.penalized = () if bos_token_id is None else (bos_token_id,)
        return made


def _known_ids(image: ProcessedImage) -> Int[np.ndarray, " N"]:
    """The ids of an image's tokens: 30 bits of a hash for each."""
    count = image.tokens
    found = hashlib.shake_128(image.digest + repr((image.grid, count)).encode()).digest(4 * count)
    return IMAGE_IDS + (np.frombuffer(found, np.uint32) >> 2).astype(np.int64)


def chat_prompt(
    tokenizer: "Tokenizer",
    config: ModelConfig,
    messages: Sequence[Message],
    max_slices: int | None = None,
    room: int | None = None,
    **given: Any,
) -> PromptIds:
    """The prompt of a conversation, with its images.

    Arguments:
        tokenizer, config: of the model.
        messages: as for `encode_chat`; a model that does not see takes text alone.
        max_slices, room: as for `encode_chat`.
        given: the other arguments of `Tokenizer.apply_chat`.

    Raises:
        InputError: as `encode_chat` and `Tokenizer.apply_chat`.
    """
    if config.vision is None:
        if any(_has_image(message) for message in messages):
            raise InputError(f"the model ({config.family.architecture}) takes no images; load one that sees.")
        return PromptIds(tokenizer.apply_chat(messages, **given), config.vocab_size)
    chat = encode_chat(tokenizer, config.vision, messages, max_slices, room, **given)
    return ImagePrompt.of(chat, config.vocab_size, tokenizer.bos_token_id)


def _has_image(message: Any) -> bool:
    content = message.get("content") if isinstance(message, Mapping) else None
    return isinstance(content, list) and any(
        isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS for part in content
    )


def penalized_ids(prompt: Sequence[int], generated: Sequence[int] = ()) -> list[int]:
    """The ids that a repetition penalty counts."""
    return [*(prompt.penalized if isinstance(prompt, ImagePrompt) else prompt), *generated]


class Features:
    """The tokens that models made of the latest images, bounded in bytes."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, model: SeeingModel, images: Iterable[ProcessedImage]) -> Float[np.ndarray, "N D"]:
        """The tokens of images, one after the other; parts of one size that are not known run together."""
        images = list(images)
        with self._lock:
            found = {image.digest: self._kept[image.digest] for image in images if image.digest in self._kept}
        missing = {image.digest: image for image in images if image.digest not in found}
        found |= _encoded(model, missing.values())
        with self._lock:
            for image in images:
                self._kept[image.digest] = found[image.digest]
                self._kept.move_to_end(image.digest)
            while sum(x.nbytes for x in self._kept.values()) > KEPT_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return np.concatenate([found[image.digest] for image in images])


_features: dict[int, Features] = {}  # of each model, by its id: a module of MLX has no hash


def features_of(model: SeeingModel, prompt: ImagePrompt) -> Float[np.ndarray, "N D"]:
    """The image tokens of a prompt, in order."""
    if id(model) not in _features:
        weakref.finalize(model, _features.pop, id(model), None)
    return _features.setdefault(id(model), Features()).of(model, prompt.images)


def _encoded(model: SeeingModel, images: Iterable[ProcessedImage]) -> dict[bytes, np.ndarray]:
    """The tokens of images, by digest."""
    images = list(images)
    by_size: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for i, image in enumerate(images):
        for part, array in enumerate(image.parts):
            by_size.setdefault(array.shape, []).append((i, part))
    made: dict[tuple[int, int], np.ndarray] = {}
    for wanted in by_size.values():
        while wanted:
            count = min(AT_ONCE, 1 << (len(wanted).bit_length() - 1))
            now, wanted = wanted[:count], wanted[count:]
            tokens = model.encode_images(np.stack([images[i].pixels(part) for i, part in now]))
            made |= zip(now, np.asarray(tokens), strict=True)
    return {
        image.digest: np.concatenate([made[i, part] for part in range(len(image.parts))])
        for i, image in enumerate(images)
    }


Inputs = tuple[Int[np.ndarray, " T"], Float[np.ndarray, "T D"] | None]


def chunk_inputs(model: Any, prompt: PromptIds, text: Sequence[int], start: int, stop: int) -> Inputs:
    """The inputs of a part of a text that begins with a prompt.

    Returns: the ids, with the vocabulary's size in place of image tokens, and the image tokens at their places; None
    where the part has none.
    """
    ids = np.array(text[start:stop], np.int32)
    if not isinstance(prompt, ImagePrompt):
        return ids, None
    first, last = np.searchsorted(prompt.places, (start, start + len(ids)))
    if first == last:
        return ids, None
    tokens = features_of(model, prompt)
    features = np.zeros((len(ids), tokens.shape[1]), np.float32)
    features[prompt.places[first:last] - start] = tokens[first:last]
    return np.minimum(ids, model.config.vocab_size), features


def padded_inputs(
    rows: Sequence[Inputs], width: int, left: bool = False
) -> tuple[Int[np.ndarray, "B W"], Float[np.ndarray, "B W D"] | None]:
    """The `chunk_inputs` of several rows, padded to one ``width`` on the right, or on the ``left``."""
    ids = np.zeros((len(rows), width), np.int32)
    sizes = {tokens.shape[1] for _, tokens in rows if tokens is not None}
    features = np.zeros((len(rows), width, sizes.pop()), np.float32) if sizes else None
    for i, (row, tokens) in enumerate(rows):
        there = slice(width - len(row), None) if left else slice(len(row))
        ids[i, there] = row
        if features is not None and tokens is not None:
            features[i, there] = tokens
    return ids, features
