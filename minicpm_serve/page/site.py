"""The page and the API behind one port."""

import os
import secrets
from dataclasses import replace
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: nothing is sent anywhere

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Match

from minicpm_serve.engine import ServingEngine
from minicpm_serve.http.errors import add_handlers, refusal
from minicpm_serve.http.gate import Access, add_gate
from minicpm_serve.page.answering import Answering
from minicpm_serve.page.blocks import CSS, THEME, page
from minicpm_serve.page.pictures import uploads
from minicpm_serve.page.texts import TEXTS

UPLOAD = "/gradio_api/upload"  # only a model that sees has a use for files, which would fill the disk
USER = "minicpm"  # the user name at the login; the password is the API key


def site(api: FastAPI, engine: ServingEngine, name: str, access: Access) -> "Beside":
    """The page in front of the API.

    Arguments:
        api: of `minicpm_serve.http.app.application`; all its paths stay as they are.
        engine: runs the model.
        name: the model's name.
        access: as of the API. With a key, the page asks for it as the password of the user ``minicpm``.
    """
    limits = api.state.limits
    if limits.images is not None:
        limits = replace(limits, images=uploads(limits.images.max_slices))
    chat = page(Answering(engine, api.state.metrics, limits), name)
    # Many requests may be open; the engine has the queue.
    chat.queue(default_concurrency_limit=None, max_size=limits.places)
    outer = FastAPI(openapi_url=None)
    add_handlers(outer)
    add_gate(outer, Access(hosts=access.hosts), api.state.largest_body)
    key = access.api_key

    def known(user: str, password: str) -> bool:
        return user == USER and key is not None and secrets.compare_digest(password.encode(), key.encode())

    gr.mount_gradio_app(
        outer,
        chat,
        path="/",
        auth=known if key is not None else None,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        theme=THEME,
        css=CSS,
        i18n=gr.I18n(**TEXTS),
    )
    return Beside(api, outer, files=limits.images is not None)


class Beside:
    """An ASGI application: the paths of ``api`` go there, and all others to ``other``. ``files``: may be uploaded."""

    def __init__(self, api: FastAPI, other: Any, files: bool):
        self._api, self._other, self._files = api, other, files

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not self._files and scope["path"].startswith(UPLOAD):
            return await refusal(403, "the page takes no files.")(scope, receive, send)
        served = scope["type"] == "http" and any(r.matches(scope)[0] != Match.NONE for r in self._api.routes)
        await (self._api if served else self._other)(scope, receive, send)
