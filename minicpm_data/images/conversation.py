"""A conversation with images as token ids, in which the tokens of an image have no id yet.

MiniCPM-V puts all images of a message before its text, each followed by a line break:
``<image>`` + a token for each query of the resampler + ``</image>``; then, where the image is cut,
``<slice>`` + the same for each slice, a line break after each row + ``</slice>``. OmniLMM takes images inside a text
too: ``<im_start>`` + the tokens + ``<im_end>``; its conversations begin with a system message of its own.

Only parts of type image make these tokens. A text that spells them is encoded as text.

Source: chat() of openbmb/MiniCPM-V and MiniCPM-V-2, chat.py of OmniLMM in OpenBMB/MiniCPM-V.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minicpm_data.conversation.messages import IMAGE_PARTS, Message, checked_list
from minicpm_data.images.processing import ProcessedImage, process
from minicpm_data.keys import escaped
from weights_io.errors import InputError
from weights_io.vision.config import VisionConfig

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer

IMAGE = -1  # in place of the ids of an image's tokens
OMNILMM_SYSTEM = (
    "You are an artificial intelligence assistant, which gives helpful, detailed, and polite answers to the human's "
    "questions."
)
MOST_IMAGES = 256  # of a conversation
DETAILS = ("detail", "cache_control")  # OpenAI's, which choose nothing here


@dataclass(frozen=True)
class ImageChat:
    """A conversation as ids, with `IMAGE` at the tokens of its images, in their order."""

    ids: list[int]
    images: tuple[ProcessedImage, ...]


def encode_chat(
    tokenizer: "Tokenizer",
    vision: VisionConfig,
    messages: Sequence[Message],
    max_slices: int | None = None,
    room: int | None = None,
    **given: Any,
) -> ImageChat:
    """Encode a conversation.

    Arguments:
        tokenizer: of the model.
        vision: of the model.
        messages: as for `Tokenizer.apply_chat`. A content may be a list of parts, of which those of type image hold
            ``image`` (a path, bytes, a PIL image or a processed one) or ``image_url`` (a ``data:`` URL, plain or as
            ``{"url": ...}``).
        max_slices: as for `process`.
        room: tokens that images may have in all; None: any number.
        given: the other arguments of `Tokenizer.apply_chat`.

    Raises:
        InputError: as `Tokenizer.apply_chat` and `process`; a part cannot be used; or the images have too many tokens.
    """
    marker = _new_marker()
    texts, found = _texts(vision, messages, marker, max_slices, room)
    pieces = tokenizer.chat_pieces(texts, marker, **given)
    if len(pieces) != len(found) + 1:
        raise InputError("the chat template drops or repeats the place of an image; use the model's own template.")
    ids = list(pieces[0])
    for image, after in zip(found, pieces[1:], strict=True):
        ids += [*places(tokenizer, image), *after]
    return ImageChat(ids, tuple(found))


def encode_example(
    tokenizer: "Tokenizer",
    vision: VisionConfig,
    messages: Sequence[Message],
    trained: Sequence[bool],
    prompts: bool = False,
    trusted: bool = True,
    tools: Sequence[Any] | None = None,
    max_slices: int | None = None,
) -> tuple[ImageChat, list[bool]]:
    """Encode a conversation for training.

    Arguments:
        tokenizer, vision, messages, max_slices: as for `encode_chat`.
        trained, prompts, trusted, tools: as for `Tokenizer.chat_example`.

    Returns:
        The conversation, and for each of its ids whether it is a target; the tokens of images never are.

    Raises:
        InputError: as `encode_chat` and `Tokenizer.chat_example`.
    """
    marker = _new_marker()
    texts, found = _texts(vision, messages, marker, max_slices)
    wanted = [False] * (len(texts) - len(messages)) + [*trained]
    short, marked = tokenizer.chat_example(texts, wanted, prompts, trusted, tools, marker)
    if short.count(IMAGE) != len(found):
        raise InputError("an image comes after the last answer, where nothing is trained; remove it.")
    ids: list[int] = []
    targets: list[bool] = []
    waiting = iter(found)
    for i, target in zip(short, marked, strict=True):
        new = places(tokenizer, next(waiting)) if i == IMAGE else [i]
        ids += new
        targets += [target and i != IMAGE] * len(new)
    return ImageChat(ids, tuple(found)), targets


def _new_marker() -> str:
    return f"\ue000{secrets.token_hex(8)}\ue001"


def _texts(
    vision: VisionConfig,
    messages: Sequence[Message],
    marker: str,
    max_slices: int | None,
    room: int | None = None,
) -> tuple[list[Message], list[ProcessedImage]]:
    """The messages as the template is given them, with markers for images, and the images."""
    found: list[ProcessedImage] = []
    texts: list[Message] = []
    for i, message in enumerate(checked_list(messages)):
        text, images = _split(message, f"message {i}", marker, vision.variant == "omnilmm")
        for part in images:  # one at a time: too many are refused before the rest are opened
            found.append(_processed(part, f"message {i}", vision, max_slices))
            taken = sum(image.tokens for image in found)
            if len(found) > MOST_IMAGES or (room is not None and taken > room):
                raise InputError(
                    f"the first {len(found)} images have {taken:,} tokens, and there is room for "
                    f"{room or MOST_IMAGES * vision.num_queries:,}; send fewer, or smaller ones."
                )
        texts.append(text)
    if vision.variant == "omnilmm" and not any(message.get("role") in ("system", "developer") for message in texts):
        texts.insert(0, {"role": "system", "content": OMNILMM_SYSTEM})
    return texts, found


def _split(message: Any, what: str, marker: str, in_place: bool) -> tuple[Message, list[Mapping[str, Any]]]:
    """A message with markers for its images, and their parts. ``in_place``: not all before the text."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message, []
    images = [part for part in content if _is_image(part)]
    if images and message.get("role") != "user":
        raise InputError(
            f"{what} is of the role {escaped(message.get('role'))} and has an image; only users send images."
        )
    rest = [part for part in content if not _is_image(part)]
    if in_place and images:  # in its place; a line break after one that begins the text
        parts = [{"type": "text", "text": marker} if _is_image(part) else part for part in content]
        first = next((i for i, part in enumerate(content) if not _is_image(part)), len(content))
        parts[:first] = [{"type": "text", "text": f"{marker}\n"}] * first
    else:
        parts = [{"type": "text", "text": f"{marker}\n" * len(images)}, *rest] if images else rest
    return {**message, "content": parts}, images


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS


def _processed(part: Mapping[str, Any], what: str, vision: VisionConfig, max_slices: int | None) -> ProcessedImage:
    """The image of a part."""
    kind = part["type"]
    key = "image" if kind == "image" else "image_url"
    if unknown := sorted(str(name) for name in part if name not in ("type", key, *DETAILS)):
        raise InputError(f"{what} has a part of type {kind!r} with {escaped(unknown[0])!r}; it may have {key!r}.")
    source = part.get(key)
    if isinstance(source, Mapping) and kind == "image_url":
        if unknown := sorted(str(name) for name in source if name not in ("url", *DETAILS)):
            raise InputError(f"{what} has an image_url with {escaped(unknown[0])!r}; it may have 'url'.")
        source = source.get("url")
    if source is None:
        raise InputError(f"{what} has a part of type {kind!r} without {key!r}; add it.")
    return source if isinstance(source, ProcessedImage) else process(source, vision, max_slices)


def places(tokenizer: "Tokenizer", image: ProcessedImage) -> list[int]:
    """The ids of an image in a prompt, with `IMAGE` at its tokens.

    Raises:
        InputError: the tokenizer lacks a token.
    """
    if image.vision.variant == "omnilmm":  # added behind the vocabulary, in this order
        last = tokenizer.vocab_size
        start, end = (tokenizer.token_to_id(token) for token in ("<im_start>", "<im_end>"))
        return [last + 1 if start is None else start, *_tokens(image), last + 2 if end is None else end]
    start, end = _ids(tokenizer, "<image>", "</image>")
    one = [start, *_tokens(image), end]
    if image.grid is None:
        return one
    opening, closing = _ids(tokenizer, "<slice>", "</slice>")
    columns, rows = image.grid
    line = tokenizer.encode("\n", add_bos=False)
    found = [*one, opening]
    for row in range(rows):
        found += [*(line if row else ()), *one * columns]
    return [*found, closing]


def _tokens(image: ProcessedImage) -> list[int]:
    return [IMAGE] * image.vision.num_queries


def _ids(tokenizer: "Tokenizer", *tokens: str) -> list[int]:
    found = [tokenizer.token_to_id(token) for token in tokens]
    if None in found:
        raise InputError(f"the tokenizer has no {' or '.join(tokens)}; use the tokenizer files of the model.")
    return [i for i in found if i is not None]
