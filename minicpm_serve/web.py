"""A web page to chat with a model, and OpenAI's API beside it: one engine, one port.

    python -m minicpm_serve.web --model minicpm4-0.5b

Open the address that it prints. Ctrl-C stops it.
"""

from dataclasses import dataclass
from importlib.util import find_spec

from minicpm_serve import openai_api
from weights_io import command_line
from weights_io.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options(openai_api.Options):
    port: int = 7860
    """Port of the page, and of the API under /v1. 0 selects a free port."""


def main(options: Options) -> None:
    """Chat with a MiniCPM (or Llama) model on a web page; OpenAI's API is at the same address."""
    if find_spec("gradio") is None:
        raise InputError("the page needs gradio: pip install 'minicpm-jax-mlx[web]'.")
    from minicpm_serve.page.site import site

    openai_api.serve(options, site)


if __name__ == "__main__":
    command_line.run(main, Options, "python -m minicpm_serve.web")
