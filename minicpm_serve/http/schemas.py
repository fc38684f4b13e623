"""What a request to the API may hold. Wrong types are pydantic's errors, which `sentence` puts into words.

What can be long is checked item by item, in a thread: pydantic lets no other thread run, and keeps the errors of all
the million items that a body has room for.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from minicpm_data.conversation.tool_definitions import checked_tools, function_of
from minicpm_data.generation.options import MOST_BIASED, MOST_LOGPROBS, Sampling
from minicpm_data.generation.responses import stop_strings
from minicpm_serve.http.image_access import ImageAccess
from minicpm_serve.http.response_format import Formatted
from weights_io.errors import InputError, listed, short

# What is not supported, and the values with which it asks for nothing; null always does.
UNSUPPORTED_UNLESS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "tool_calls": ([],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "annotations": ([],),
    "refusal": ("",),
    "reasoning_content": ("",),
    "verbosity": ("medium",),
    # vLLM's and llama.cpp's, which clients with a form for them send as they stand there.
    "repeat_penalty": (1, 1.0),
    "length_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "mirostat": (0,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "continue_final_message": (False,),
    "return_token_ids": (False,),
    "add_generation_prompt": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
}
IGNORED_KEYS = {  # without effect on the answer
    "user",
    "name",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "include_obfuscation",
    "cache_control",
}
SHAPES = {  # of fields that may be one thing or another
    "prompt": "a text, a list of texts, a list of token ids or a list of such lists",
    "stop": "a text or a list of texts",
    "input": "a text or a list of messages",
    "logprobs": "true or false in a chat, and a number from 0 to 5 in a completion",
    "content": 'a text or a list of {"type": "text", "text": "..."}',
}
TOOL_CHOICES = '"none", "auto", "required" or {"type": "function", "function": {"name": "..."}}'
NO_TOP_K = -1  # vLLM's default; 0 here
MOST_TEXT_LOGPROBS = 5  # of a completion, as OpenAI's
MOST_CHOICES = 128
MOST_STOPS = 16
LONGEST_STOP = 1000  # characters; each token of an answer is compared with every beginning of it


Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    def check_rest(self) -> None:
        """Raises `InputError` for unsupported fields, unless their value has no effect."""
        wrong = [
            name
            for name, value in (self.model_extra or {}).items()
            if not (
                value is None or name in IGNORED_KEYS or any(_same(value, n) for n in UNSUPPORTED_UNLESS.get(name, ()))
            )
        ]
        if len(wrong) > 1:
            raise InputError(f"{listed(wrong)} are not supported; leave them out.")
        for name in wrong:
            remedy = f" or give {json.dumps(UNSUPPORTED_UNLESS[name][0])}" if name in UNSUPPORTED_UNLESS else ""
            raise InputError(f"is not supported; leave it out{remedy}.", option=short(name))


class Part(Strict):
    type: str
    text: str | None = None
    image_url: str | dict[str, Any] | None = None

    def plain(self, images: ImageAccess | None) -> dict[str, Any]:
        """The part as `minicpm_data.conversation.messages` expects it. Raises `InputError` for other parts than text,
        and than images where the model sees."""
        if self.type == "image_url" and images is not None:
            self.check_rest()
            return {"type": "image", "image": images.source({"image_url": self.image_url})}
        if self.type != "text":
            kinds = "only text" if images is None else "text and image_url"
            raise InputError(f"a message holds a part of type {short(self.type)!r}; this model reads {kinds}.")
        self.check_rest()
        if self.text is None:
            raise InputError('a part of type "text" has no text; give it one.')
        return {"type": "text", "text": self.text}


class Message(Strict):
    role: str
    content: str | list[Any] | None = Field(default=None, validate_default=True)
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    regions: list[Any] | None = None  # sent back with our answer, whose text has them

    @field_validator("content")
    @classmethod
    def _present(cls, content: Any, info: ValidationInfo) -> Any:
        """Only an answer may be without a text: it may be a thought or calls."""
        if content is None and info.data.get("role") != "assistant":
            raise PydanticCustomError("missing", "")
        return content

    def plain(self, images: ImageAccess | None = None) -> dict[str, Any]:
        """The message as `minicpm_data.conversation.messages` expects it. ``images``: of a model that sees."""
        self.check_rest()
        text: Any = self.content or ""
        if not isinstance(text, str):
            parts = [valid(Part, part, "content", i).plain(images) for i, part in enumerate(text)]
            only_text = all(part["type"] == "text" for part in parts)
            text = "".join(part["text"] for part in parts) if only_text else parts
        others = self.model_dump(include={"reasoning_content", "reasoning", "tool_calls", "tool_call_id"})
        return {"role": self.role, "content": text, **{key: value for key, value in others.items() if value}}


class StreamOptions(Strict):
    include_usage: bool | None = None


class Body(Formatted, Strict):
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_tokens_to_keep: int | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Raises `InputError` for values that neither pydantic nor `Sampling` nor the engine checks."""
        self.check_rest()
        _ = self.format
        if not 1 <= self.choices <= MOST_CHOICES:
            raise InputError(f"is {self.n}; it must be from 1 to {MOST_CHOICES}.", option="n")
        if len(self.stops) > MOST_STOPS:
            raise InputError(f"holds {len(self.stops)} texts; give at most {MOST_STOPS}.", option="stop")
        if (longest := max(map(len, self.stops), default=0)) > LONGEST_STOP:
            raise InputError(f"holds a text of {longest:,} characters; give at most {LONGEST_STOP:,}.", option="stop")
        if self.stream_options is not None:
            self.stream_options.check_rest()

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def answers(self) -> int:
        """Number of answers that the request asks for."""
        return self.choices

    @property
    def stops(self) -> tuple[str, ...]:
        return stop_strings(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, **usual: float) -> Sampling:
        """The sampling options of the request; ``usual`` are the defaults."""
        names = (f.name for f in fields(Sampling) if f.name in type(self).model_fields)
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k == NO_TOP_K:
            given["top_k"] = 0
        if self.logit_bias:
            given["logit_bias"] = token_biases(self.logit_bias)
        return Sampling(**{**usual, **given})


@dataclass(frozen=True)
class ToolUse:
    """How an answer may use tools.

    Attributes:
        tools: what the model is told of; empty where it may use none.
        forced: it has to call one.
        name: the one that it has to call; None: any.
        parallel: it may call several.
    """

    tools: tuple[Any, ...] = ()
    forced: bool = False
    name: str | None = None
    parallel: bool = True

    @property
    def callable(self) -> list[Any]:
        """The tools that it may call."""
        return [tool for tool in self.tools if self.name in (None, function_of(tool)["name"])]


class ChatBody(Body):
    messages: list[Any]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_budget: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MOST_LOGPROBS:
            raise InputError(f"is {self.top_logprobs}; it must be from 0 to {MOST_LOGPROBS}.", option="top_logprobs")
        if self.top_logprobs and not self.logprobs:
            raise InputError("is for {logprobs} true; give it too, or leave it out.", "top_logprobs", ["logprobs"])
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InputError(
                "and {max_completion_tokens} mean the same; give one of them.", "max_tokens", ["max_completion_tokens"]
            )

    def tool_use(self) -> ToolUse:
        """What the request says about tools. Raises `InputError` for tools or a choice that cannot be."""
        tools, choice = checked_tools(self.tools or None), self.tool_choice
        name = _tool_name(choice) if isinstance(choice, dict) else None
        if name is None and choice not in (None, "none", "auto", "required"):
            raise InputError(f"is {short(json.dumps(choice))}; it must be {TOOL_CHOICES}.", option="tool_choice")
        forced = name is not None or choice == "required"
        if forced and not tools:
            raise InputError("asks for a call, and there are no tools; give some.", option="tool_choice")
        if choice == "none" or not tools:
            return ToolUse()
        parallel = self.parallel_tool_calls is not False and name is None
        use = ToolUse(tuple(tools), forced, name, parallel)
        if not use.callable:
            raise InputError(f"names {short(name or '')!r}, which is none of the tools.", option="tool_choice")
        return use

    def plain(self, images: ImageAccess | None = None) -> list[dict[str, Any]]:
        """The messages as `minicpm_data.conversation.messages` expects them. ``images``: of a model that sees."""
        return plain_messages(self.messages, images)

    @property
    def described(self) -> int | None:
        """How many likeliest tokens are described with each token; None: no probability is asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionBody(Body):
    prompt: Any
    echo: bool | None = None
    logprobs: int | bool | None = None

    def check(self) -> None:
        super().check()
        if self.logprobs is True or (self.described is not None and not 0 <= self.described <= MOST_TEXT_LOGPROBS):
            given = json.dumps(self.logprobs)
            raise InputError(f"is {given}; it must be from 0 to {MOST_TEXT_LOGPROBS}.", option="logprobs")
        if self.max_tokens == 0 and not self.echo:
            raise InputError("is 0, which is for {echo} true; give at least 1.", "max_tokens", ["echo"])

    @property
    def described(self) -> int | None:
        """As in `ChatBody`."""
        return None if self.logprobs is None or self.logprobs is False else int(self.logprobs)

    @property
    def ends(self) -> bool:
        """The answer is the prompt alone."""
        return self.max_tokens == 0

    @field_validator("prompt", mode="plain")
    @classmethod
    def _one_shape(cls, prompt: Any) -> Any:
        """Check the type by hand. pydantic would try four types in turn, over millions of items."""
        kinds = {str} if isinstance(prompt, str) else _types(prompt)
        if kinds not in (set(), {str}, {int}, {list}):
            raise ValueError
        if kinds == {list} and not all(_types(ids) <= {int} for ids in prompt):
            raise ValueError
        return prompt

    @property
    def prompts(self) -> list[Any]:
        """The prompts, each a text or token ids."""
        one = isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt

    @property
    def answers(self) -> int:
        return self.choices * len(self.prompts)


def plain_messages(messages: Sequence[Any], images: ImageAccess | None = None) -> list[dict[str, Any]]:
    """The messages of a body as `minicpm_data.conversation.messages` expects them. ``images``: of a model that sees."""
    return [valid(Message, message, "messages", i).plain(images) for i, message in enumerate(messages)]


def token_biases(given: dict[str, Any]) -> dict[int, float]:
    """A ``logit_bias``, whose keys JSON makes texts. Raises `InputError` for what is no token id or no number."""
    if len(given) > MOST_BIASED:
        raise InputError(f"holds {len(given):,} tokens; give at most {MOST_BIASED}.", option="logit_bias")
    for token, value in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise InputError(f"holds {short(token)!r}, which is no token id.", option="logit_bias")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"gives token {token} {short(repr(value))}; give a number.", option="logit_bias")
    return {int(token): value for token, value in given.items()}


def _tool_name(choice: dict[str, Any]) -> str:
    """The tool that a choice names. Raises `InputError` where it names none."""
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type", "function") != "function" or not isinstance(name, str):
        raise InputError(f"is {short(json.dumps(choice))}; it must be {TOOL_CHOICES}.", option="tool_choice")
    return name


def sentence(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Pydantic's first error as a sentence, and the field that it concerns."""
    error = errors[0]
    place = error["loc"][1:]  # after "body"
    if error["type"] == "json_invalid":
        return f"the body is not JSON ({error['ctx']['error']}).", None
    if not place:
        return "the body must be a JSON object, sent with Content-Type: application/json.", None
    # In a field with several shapes, the path goes on with the shape's name and the place within it.
    ends = next((i + 1 for i, part in enumerate(place) if part in SHAPES), len(place))
    path = ".".join(map(str, place[:ends]))
    if error["type"] == "missing":
        return f"{path} is missing.", path
    if place[ends - 1] in SHAPES:
        return f"{path} must be {SHAPES[place[ends - 1]]}.", path
    return f"{path}: {error['msg'][0].lower()}{error['msg'][1:]}.", path


def valid(kind: type[Model], value: Any, *place: Any) -> Model:
    """Validate ``value`` as a ``kind``. An error is reported with its place in the whole body."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise RequestValidationError([{**first, "loc": ("body", *place, *first["loc"])}]) from None


def _types(value: Any) -> set[type]:
    """The types of a list's items; for a value that is no list, a type that is never accepted."""
    return set(map(type, value)) if isinstance(value, list) else {type(None)}


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
