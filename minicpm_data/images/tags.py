"""Conversations with images in files: ``images`` beside ``messages``, and a tag ``<image>`` at the place of each.

It is the form of LLaMA-Factory's data sets; `minicpm_jax.chat` and its twin write and read it too.
"""

from collections.abc import Sequence
from typing import Any

from minicpm_data.conversation.messages import IMAGE_PARTS
from weights_io.errors import InputError

TAG = "<image>"


def with_tags(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages whose parts of type image became tags, and the paths of the images. Raises `InputError` for an image
    that has no path, or a text that spells the tag."""
    paths: list[str] = []
    found = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            found.append(message)
            continue
        text = ""
        for part in content:
            if part["type"] in IMAGE_PARTS:
                if not (path := getattr(part["image"], "path", "")):
                    raise InputError("an image of the conversation has no file, so it cannot be saved.")
                paths.append(path)
                text += f"{TAG}\n"
            else:
                text += part["text"]
        found.append({**message, "content": text})
    if paths and sum(message["content"].count(TAG) for message in found) != len(paths):
        raise InputError(f"a text of the conversation spells {TAG}, so its images cannot be told apart in a file.")
    return found, paths


def with_parts(messages: Sequence[dict[str, Any]], images: Sequence[Any], what: str) -> list[dict[str, Any]]:
    """Messages whose tags became parts of type image.

    Arguments:
        messages: with texts for contents.
        images: one for each tag, in order.
        what: where they stand, for messages.

    Raises:
        InputError: there are more tags than images, or fewer.
    """
    count = sum(message["content"].count(TAG) for message in messages if message["role"] == "user")
    if count != len(images):
        raise InputError(f"{what} has {count} tags {TAG} and {len(images)} images; there must be one for each.")
    waiting = iter(images)
    found = []
    for message in messages:
        if message["role"] != "user" or TAG not in message["content"]:
            found.append(message)
            continue
        first, *others = message["content"].split(TAG)
        parts = [{"type": "text", "text": first}] if first else []
        for text in others:
            parts.append({"type": "image", "image": next(waiting)})
            text = text if first else text.removeprefix("\n")  # the line break that follows an image before the text
            parts += [{"type": "text", "text": text}] if text else []
        found.append({**message, "content": parts})
    return found
