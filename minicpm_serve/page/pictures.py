"""Images on the page: uploaded or taken with a camera, and drawn again with the regions that an answer names.

The browser uploads files into Gradio's own folder, and the page reads no others.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from minicpm_data.conversation.regions import regions, without_tags
from minicpm_data.images.drawing import draw
from minicpm_data.images.opening import open_image
from minicpm_serve.http.image_access import ImageAccess

KEPT = (3600, 24 * 3600)  # seconds: files older than the second are deleted every so many of the first
LONGEST_SIDE = 1024  # pixels of an image that is drawn again


def uploads(max_slices: int | None) -> ImageAccess:
    """Access to the files that the page's visitors uploaded, and to no others."""
    return ImageAccess(Path(get_upload_folder()).resolve(), max_slices)


class Chat(gr.ChatInterface):
    """A `gradio.ChatInterface` with images in messages of their own, before that of the text: a message that is
    edited keeps only its text."""

    def _message_as_message_dict(self, message: Any, role: Any) -> list:
        if not (isinstance(message, dict) and message.get("files")):
            return super()._message_as_message_dict(message, role)
        shown = super()._message_as_message_dict({"text": "", "files": message["files"]}, role)
        return shown + (super()._message_as_message_dict(message["text"], role) if message["text"] else [])


def text_of(turn: dict[str, Any]) -> str:
    """The text of a message as Gradio keeps it; of an answer with regions, as the model wrote it."""
    written = (turn.get("metadata") or {}).get("log")
    return written or "".join(part["text"] for part in turn["content"] if part["type"] == "text")


def images_of(turn: dict[str, Any]) -> list[str]:
    """The paths of a message's images."""
    return [part["file"]["path"] for part in turn["content"] if part["type"] == "file"]


def content(text: str, files: Iterable[Any]) -> str | list[dict[str, Any]]:
    """The content of a message in a body of ``/v1/chat/completions``: images before the text.

    Arguments:
        text: of the message.
        files: paths of images, or what Gradio keeps of a file.
    """
    paths = [file["path"] if isinstance(file, dict) else file for file in files]
    if not paths:
        return text
    urls = [Path(path).resolve().as_uri() for path in paths]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*parts, {"type": "text", "text": text}]


def drawn(answer: str, images: list[str]) -> gr.ChatMessage | None:
    """The message that shows an answer with regions: its text, and the regions on the latest image.

    Arguments:
        answer: as the model wrote it, which the message keeps for later requests.
        images: paths of the conversation's images, which the model has read.

    Returns:
        The message; None where the answer names no region or there is no image.
    """
    found = regions(answer)
    if not found or not images:
        return None
    image = open_image(Path(images[-1]))
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = save_pil_to_cache(draw(image, found), get_upload_folder(), "regions", "png")
    labels = [f"{i}. {region.label}" for i, region in enumerate(found, 1) if region.label]
    text = without_tags(answer).strip()
    if len(labels) > 1:  # one label is in the text already
        text = "\n\n".join([text, "\n".join(labels)])
    return gr.ChatMessage(
        role="assistant",
        content=[*([text] if text else []), gr.FileData(path=file, mime_type="image/png")],
        metadata={"log": answer},
    )


def camera(textbox: gr.MultimodalTextbox, title: Any) -> None:
    """A camera whose photos are put beside the question. It is off until somebody opens and starts it."""
    with gr.Accordion(title, open=False):
        photo = gr.Image(sources=["webcam"], type="filepath", show_label=False, height=300, buttons=[])

    def taken(path: str | None, value: dict[str, Any]) -> tuple[Any, None]:
        files = [*value["files"], *([path] if path else [])]
        return {"text": value["text"], "files": files}, None

    photo.input(taken, [photo, textbox], [textbox, photo], api_visibility="private", queue=False)
