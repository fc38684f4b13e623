"""What a request to the API may hold. Wrong types are pydantic's errors, which `sentence` puts into words."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from minicpm_data.streaming import stop_strings
from weights_io.errors import InputError

# What is not supported, and the values with which it asks for nothing; null always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "tool_calls": ([],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}
WITHOUT_EFFECT = {  # on the answer
    "user",
    "name",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "include_obfuscation",
}
SHAPES = {  # of fields that may be one thing or another
    "prompt": "a text, a list of texts, a list of token ids or a list of such lists",
    "stop": "a text or a list of texts",
    "content": 'a text or a list of {"type": "text", "text": "..."}',
}
MOST_CHOICES = 128
MOST_STOPS = 16


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    def check_rest(self) -> None:
        """`InputError` for what is not supported and asks for something."""
        for name, value in (self.model_extra or {}).items():
            allowed = NEUTRAL.get(name, ())
            if value is None or name in WITHOUT_EFFECT or any(_same(value, neutral) for neutral in allowed):
                continue
            remedy = f"leave it out or give {json.dumps(allowed[0])}" if allowed else "leave it out"
            raise InputError(f"{name} is not supported; {remedy}.")


class Part(Strict):
    type: str
    text: str = ""


class Message(Strict):
    role: str
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """As `minicpm_data.chat` has them; "developer" is OpenAI's newer name of "system"."""
        self.check_rest()
        parts = [] if isinstance(self.content, str) else self.content
        for part in parts:
            if part.type != "text":
                raise InputError(f"a message holds a part of type {part.type!r}; this model reads only text.")
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    include_usage: bool | None = None


class Body(Strict):
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """`InputError` for what pydantic cannot see, but for what `Sampling` and the engine check."""
        self.check_rest()
        if not 1 <= self.choices <= MOST_CHOICES:
            raise InputError(f"n is {self.n}; it must be from 1 to {MOST_CHOICES}.")
        if len(self.stops) > MOST_STOPS:
            raise InputError(f"stop holds {len(self.stops)} texts; give at most {MOST_STOPS}.")
        if self.stream_options is not None:
            self.stream_options.check_rest()

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        return stop_strings(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self) -> dict[str, Any]:
        """What is given, under the names of `Sampling`."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class ChatBody(Body):
    messages: list[Message]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(Body):
    prompt: str | list[str] | list[int] | list[list[int]]

    @property
    def prompts(self) -> list[Any]:
        """One or more, each a text or token ids."""
        one = isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)


def sentence(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Pydantic's first error as a sentence, and the field that it is about."""
    error = errors[0]
    place = error["loc"][1:]  # after "body"
    if error["type"] == "json_invalid":
        return f"the body is not JSON ({error['ctx']['error']}).", None
    if not place:
        return "the body must be a JSON object, sent with Content-Type: application/json.", None
    # Behind a field of several shapes stand the shape's name and the place within it.
    ends = next((i + 1 for i, part in enumerate(place) if part in SHAPES), len(place))
    path = ".".join(map(str, place[:ends]))
    if error["type"] == "missing":
        return f"{path} is missing.", path
    if place[ends - 1] in SHAPES:
        return f"{path} must be {SHAPES[place[ends - 1]]}.", path
    return f"{path}: {error['msg'][0].lower()}{error['msg'][1:]}.", path


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
