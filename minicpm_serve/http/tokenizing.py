"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, with vLLM's fields."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from minicpm_data.conversation.tool_definitions import checked_tools
from minicpm_data.generation.request import text_ids
from minicpm_data.tokenizer.tokenizer import Tokenizer
from minicpm_serve.engine import ServingEngine
from minicpm_serve.http.choices import chat_ids
from minicpm_serve.http.limits import Limits
from minicpm_serve.http.logprobs import text_of
from minicpm_serve.http.schemas import Strict, plain_messages
from weights_io.errors import InputError


class TokenizeBody(Strict):
    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None

    def check(self) -> None:
        """Raises `InputError` where it is not clear what is to be tokenized."""
        self.check_rest()
        if (self.prompt is None) == (self.messages is None):
            raise InputError("and {messages} are what is tokenized; give one of them.", "prompt", ["messages"])
        of_chat = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")
        for name in of_chat if self.messages is None else ("add_special_tokens",):
            if getattr(self, name):
                other = "messages" if self.messages is None else "prompt"
                raise InputError(f"is for {{{other}}}; leave it out.", name, [other])


class DetokenizeBody(Strict):
    model: str | None = None
    tokens: list[Any] = Field()


def add_tokenizing(app: FastAPI, engine: ServingEngine, limits: Limits, require: Callable[[str | None], Any]) -> None:
    """Serve the tokenizer of the engine's model. ``require`` raises an error for an unknown model."""

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        require(body.model)
        body.check()
        return await run_in_threadpool(tokenized, engine, body, limits)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        require(body.model)
        body.check_rest()
        return {"prompt": await run_in_threadpool(detokenized, engine, body)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        tokenizer = tokenizer_of(engine)
        ends, begin = tokenizer.eos_token_ids, tokenizer.bos_token_id
        return {
            "bos_token": None if begin is None else text_of(tokenizer.piece(begin)),
            "eos_token": text_of(tokenizer.piece(ends[0])) if ends else None,
            "chat_template": tokenizer.chat_template,
            "model_max_length": engine.context,
        }


def tokenized(engine: ServingEngine, body: TokenizeBody, limits: Limits) -> dict[str, Any]:
    """The ids of a text or of a chat. Raises `InputError`."""
    tokenizer = tokenizer_of(engine)
    if body.messages is None:
        limits.check_texts([body.prompt or ""])
        ids = tokenizer.encode(body.prompt or "", add_bos=body.add_special_tokens is not False)
    else:
        limits.check_messages(body.messages)
        how = {
            "add_generation_prompt": body.add_generation_prompt is not False,
            "continue_final_message": bool(body.continue_final_message),
        }
        if how["continue_final_message"] and body.add_generation_prompt is None:
            how["add_generation_prompt"] = False
        tools = tuple(checked_tools(body.tools or None) or ())
        messages, variables = plain_messages(body.messages, limits.images), body.chat_template_kwargs or {}
        ids = text_ids(chat_ids(engine, messages, variables, tools, limits, **how))
    strings = [text_of(tokenizer.piece(i)) for i in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": engine.context, "tokens": ids, "token_strs": strings}


def detokenized(engine: ServingEngine, body: DetokenizeBody) -> str:
    """The text of ids, with that of special tokens. Raises `InputError` for what is no id of the model."""
    tokenizer, rows = tokenizer_of(engine), engine.model.config.vocab_size
    for token in body.tokens:
        if type(token) is not int:
            raise InputError("must be a list of token ids (whole numbers).", option="tokens")
        if not 0 <= token < rows:
            raise InputError(f"holds {token}, outside the vocabulary of {rows}.", option="tokens")
    return tokenizer.decode(body.tokens, skip_special_tokens=False)


def tokenizer_of(engine: ServingEngine) -> Tokenizer:
    if engine.tokenizer is None:
        raise InputError("this checkpoint has no tokenizer; serve one that has.")
    return engine.tokenizer
