"""The page: a `gradio.ChatInterface` with the controls of sampling, thinking and the system prompt."""

import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from fastapi.concurrency import run_in_threadpool
from gradio.components.chatbot import MetadataDict

from minicpm_serve.page import pictures
from minicpm_serve.page.answering import Answering, Shown
from weights_io.errors import InputError

FONT, CODE_FONT = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # the browser's own: none is fetched
THEME = gr.themes.Soft(font=FONT, font_mono=CODE_FONT)
FORMULAS: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "$", "right": "$", "display": False},
    {"left": "\\(", "right": "\\)", "display": False},
]
COPIED = """(messages) => {
  const markdown = MARKDOWN;
  const written = (m) => m.metadata && !m.metadata.title && m.metadata.log;  // an answer with regions
  const text = (m) => written(m) || m.content.filter((p) => p.type === "text").map((p) => p.text).join("");
  const names = (m) => m.content.filter((p) => p.type === "file").map((p) => p.file.path.split(/[/\\\\]/).pop());
  const turns = [], files = [];
  let thought = "", tags = "";  // of the next message
  const add = (role, said) => {
    turns.push({role: role, content: tags + said, ...(thought ? {reasoning_content: thought} : {})});
    thought = tags = "";
  };
  for (const m of messages) {
    if (m.metadata && m.metadata.title) { thought = text(m); continue; }
    if (m.role === "user") {
      files.push(...names(m));
      tags += "<image>\\n".repeat(names(m).length);
    } else if (tags) add("user", "");
    if (text(m) || !tags) add(m.role, text(m));
  }
  if (tags) add("user", "");
  const quoted = (t) => t.split("\\n").map((line) => "> " + line).join("\\n") + "\\n\\n";
  const heading = (t) => "**" + t.role[0].toUpperCase() + t.role.slice(1) + "**\\n\\n";
  const copied = markdown
    ? turns.map((t) => heading(t) + (t.reasoning_content ? quoted(t.reasoning_content) : "") + t.content).join("\\n\\n")
    : JSON.stringify({messages: turns, ...(files.length ? {images: files} : {})}, null, 2);
  const area = document.createElement("textarea");  // navigator.clipboard exists only at https and localhost
  area.value = copied;
  document.body.appendChild(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}"""
CSS = """
.status { color: var(--body-text-color-subdued); font-size: var(--text-sm); min-height: 1.5em; }
[role=log] a[download] + button { display: none !important; }  /* would upload an image to the Hugging Face hub */
footer { display: none !important; }
"""


def page(answering: Answering, name: str) -> gr.Blocks:
    """The page.

    Arguments:
        answering: answers its conversations.
        name: the model's name, which is its title.
    """
    usual, text = answering.usual, gr.I18n()
    with gr.Blocks(title=name, analytics_enabled=False, fill_height=True, delete_cache=pictures.KEPT) as blocks:
        settings: dict[str, gr.components.Component] = {
            "system": gr.Textbox(label=text("system"), lines=2, render=False),
            "temperature": gr.Slider(
                0,
                2,
                usual.temperature,
                step=0.05,
                label=text("temperature"),
                info=text("temperature_info"),
                render=False,
            ),
            "top_p": gr.Slider(0.05, 1, usual.top_p, step=0.05, label=text("top_p"), render=False),
            "top_k": gr.Slider(0, 200, 0, step=1, label=text("top_k"), info=text("top_k_info"), render=False),
            "repetition_penalty": gr.Slider(1, 2, 1, step=0.05, label=text("repetition"), render=False),
            "max_tokens": gr.Slider(
                0, answering.context - 1, 0, step=1, label=text("most"), info=text("most_info"), render=False
            ),
            "seed": gr.Number(
                label=text("seed"), precision=0, minimum=0, info=text("seed_info"), value=None, render=False
            ),
        }
        if answering.thinks:
            choices = [(text("as_model"), ""), (text("on"), "on"), (text("off"), "off")]
            settings["thinking"] = gr.Radio(choices, value="", label=text("thinking"), render=False)
            settings["budget"] = gr.Slider(
                0, answering.context, 0, step=64, label=text("budget"), info=text("budget_info"), render=False
            )
        status = gr.Markdown(elem_classes="status", render=False)

        async def answer(message: Any, history: list[dict], *values: Any) -> AsyncIterator[tuple[list, str]]:
            asked = request(message, history, dict(zip(settings, values, strict=True)))
            shown = Shown()
            try:
                async with contextlib.aclosing(answering.answer(asked)) as stream:
                    async for shown in stream:
                        yield messages_of(shown), status_of(shown)
                if answering.sees:
                    with_regions = await run_in_threadpool(pictures.drawn, shown.text, images(message, history))
                    if with_regions is not None:
                        yield [*messages_of(shown)[:-1], with_regions], status_of(shown)
            except InputError as error:
                raise gr.Error(str(error), duration=None, print_exception=False) from None

        chatbot = gr.Chatbot(
            show_label=False,
            latex_delimiters=FORMULAS,
            buttons=["copy"],
            allow_tags=True,
            scale=1,
            placeholder=f"### {name}",
            group_consecutive_messages=not answering.sees,  # a text in a group with an image cannot be edited
            min_height=300,
        )
        textbox = _textbox(answering.sees)
        pictures.Chat(
            answer,
            chatbot=chatbot,
            textbox=textbox,
            multimodal=answering.sees,
            additional_inputs=list(settings.values()),
            additional_inputs_accordion=gr.Accordion(text("settings"), open=False, render=False),
            additional_outputs=[status],
            editable=True,
            api_visibility="private",
        )
        status.render()
        if isinstance(textbox, gr.MultimodalTextbox):
            pictures.camera(textbox, text("camera"))
        with gr.Row():
            for label, markdown in (("copy_markdown", "true"), ("copy_json", "false")):
                button = gr.Button(text(label), size="sm", scale=0, min_width=140)
                button.click(None, chatbot, None, js=COPIED.replace("MARKDOWN", markdown), api_visibility="private")
    return blocks


def _textbox(sees: bool) -> gr.Textbox | gr.MultimodalTextbox:
    """The field for a question, which takes images where the model sees."""
    text = gr.I18n()
    shared: dict[str, Any] = {"show_label": False, "scale": 7, "autofocus": True, "submit_btn": True, "stop_btn": True}
    if not sees:
        return gr.Textbox(placeholder=text("ask"), **shared)
    return gr.MultimodalTextbox(
        placeholder=text("ask_images"),  # type: ignore[arg-type]  # as of gr.Textbox
        sources=["upload"],
        file_types=["image"],
        file_count="multiple",
        max_plain_text_length=sys.maxsize,  # a long text stays a text: the model reads no files of texts
        **shared,
    )


def images(message: Any, history: list[dict]) -> list[str]:
    """The paths of all images of a conversation, in order."""
    earlier = [path for turn in history if turn["role"] == "user" for path in pictures.images_of(turn)]
    files = message.get("files", []) if isinstance(message, dict) else []
    return earlier + [file["path"] if isinstance(file, dict) else file for file in files]


def request(message: Any, history: list[dict], settings: dict[str, Any]) -> dict[str, Any]:
    """The body of ``/v1/chat/completions`` that the page asks for.

    Arguments:
        message: the question: its text, or where the model sees its ``text`` and ``files``.
        history: the earlier messages, as Gradio keeps them: a thought is a message of its own, with a title.
        settings: the values of the page's controls, by name.
    """
    settings = dict(settings)
    system, seed, most = settings.pop("system"), settings.pop("seed"), settings.pop("max_tokens")
    thinking, budget = settings.pop("thinking", ""), settings.pop("budget", 0)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    thought, files = "", list[Any]()  # of the next message
    for turn in history:
        text = pictures.text_of(turn)
        if (turn.get("metadata") or {}).get("title"):
            thought = text
            continue
        asks = turn["role"] == "user"
        if files and not asks:  # nothing was said about them
            messages.append({"role": "user", "content": pictures.content("", files)})
            files = []
        files += pictures.images_of(turn) if asks else []
        if files and not text:
            continue
        said = {"role": turn["role"], "content": pictures.content(text, files)}
        messages.append({**said, **({"reasoning_content": thought} if thought else {})})
        thought, files = "", []
    text, more = (message, []) if isinstance(message, str) else (message["text"], message.get("files", []))
    body = {**settings, "messages": [*messages, {"role": "user", "content": pictures.content(text, [*files, *more])}]}
    if most:
        body["max_tokens"] = int(most)
    if seed is not None:
        body["seed"] = int(seed)
    if thinking:
        body["chat_template_kwargs"] = {"enable_thinking": thinking == "on"}
    if budget:
        body["thinking_budget"] = int(budget)
    return body


def messages_of(shown: Shown) -> list[gr.ChatMessage]:
    """The messages that show an answer: its thought, which is folded once it is complete, and its text."""
    messages = []
    if shown.reasoning:
        metadata: MetadataDict = {
            "title": "Thought",
            "status": "pending" if shown.thinking else "done",
            "duration": round(shown.thought_seconds, 1),
        }
        messages.append(gr.ChatMessage(role="assistant", content=shown.reasoning, metadata=metadata))
    if shown.text or not shown.reasoning:
        messages.append(gr.ChatMessage(role="assistant", content=shown.text))
    return messages


def status_of(shown: Shown) -> str:
    """Number of tokens, speed, and what ended the answer if it is not the model."""
    words = [f"{shown.tokens} tokens"]
    if shown.tokens_per_second is not None:
        words.append(f"{shown.tokens_per_second:.1f} tokens/s")
    if shown.finish_reason == "length":
        words.append("maximum length reached")
    return " · ".join(words)
