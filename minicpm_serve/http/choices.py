"""From the body of a request to the answers that it asks of the engine."""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from minicpm_data.conversation.answers import AnswerParser
from minicpm_data.conversation.call_grammar import call_grammar
from minicpm_data.generation.constraint import Constraint
from minicpm_data.generation.image_prompt import ImagePrompt, chat_prompt
from minicpm_data.generation.options import ANSWER_TOKENS, CHAT_TOKENS
from minicpm_data.generation.request import GenerationRequest, PromptIds
from minicpm_data.generation.thinking import in_thought, parser_of
from minicpm_data.tokenizer.chat_template import variables_of
from minicpm_data.tokenizer.tokenizer import Tokenizer
from minicpm_serve.engine import ServingEngine
from minicpm_serve.http.answers import Answer
from minicpm_serve.http.limits import Limits
from minicpm_serve.http.schemas import ChatBody, CompletionBody, ToolUse
from weights_io.errors import InputError, short


@dataclass(frozen=True)
class Choice:
    """A requested answer.

    Attributes:
        request: what the engine is asked.
        stop: strings that end the visible answer.
        parser: makes the parser of one answer, or None where all of it is text.
        after_calls: the finish reason of an answer that calls tools.
    """

    request: GenerationRequest
    stop: tuple[str, ...]
    parser: Callable[[], AnswerParser | None] = lambda: None
    after_calls: str = "tool_calls"

    def answer(self) -> Answer:
        """The answer before its first response."""
        return Answer(self.after_calls, isinstance(self.request.prompt, ImagePrompt))

    def adapted(self, adapter: int) -> "Choice":
        """The same answer with another adapter."""
        return replace(self, request=replace(self.request, adapter=adapter))

    def drawn(self, number: int) -> "Choice":
        """The answer with this number of ``n`` equal ones. With a seed, each uses the next seed."""
        sampling = self.request.sampling
        if number == 0 or sampling.seed is None:
            return self
        drawn = replace(sampling, seed=(sampling.seed + number) % 2**63)
        return replace(self, request=replace(self.request, sampling=drawn))


def chat_choices(engine: ServingEngine, body: ChatBody, limits: Limits) -> list[Choice]:
    """The answer to a chat request. Raises `InputError`."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise InputError("a chat needs a tokenizer, and this checkpoint has none.")
    if len(body.messages) > limits.context:
        raise InputError(f"there are {len(body.messages):,} messages; send at most {limits.context:,}.")
    messages, use = body.plain(limits.images), body.tool_use()
    variables = body.chat_template_kwargs or {}
    given = [json.dumps(variables, ensure_ascii=False)] if variables else []  # they are part of the prompt
    limits.check_texts([*itertools.chain.from_iterable(map(_texts, messages)), *given])
    asking = [name for name, value in variables.items() if value not in (None, False)]
    template = (use.tools and tokenizer.tool_template) or tokenizer.chat_template
    if asking and (unknown := set(asking) - variables_of(template)):
        raise InputError(f"the model's chat template knows no variable {short(min(unknown))!r}; leave it out.")
    if use.forced and tokenizer.features.thinking:  # unless it is asked for, no thought precedes the call
        variables = {"enable_thinking": False, **variables}
    more = {} if limits.images is None else {"max_slices": limits.images.max_slices, "room": limits.context}
    config = engine.model.config
    ids = chat_prompt(tokenizer, config, messages, tools=use.tools or None, variables=variables, **more)
    thinks = variables.get("enable_thinking")
    usual = tokenizer.sampling.of(thinks if isinstance(thinks, bool) else None)
    sampling = body.sampling(temperature=usual.temperature, top_p=usual.top_p)
    most = _room(engine, ids, body.most_tokens, CHAT_TOKENS)
    request = engine.request(ids, most, sampling, body.thinking_budget)
    stops = (*body.stops, *tokenizer.turn_markers)
    if not use.tools:
        return [Choice(request, stops, lambda: parser_of(tokenizer, ids))]
    return [_with_tools(engine, tokenizer, request, stops, use)]


def _texts(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message's content."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _with_tools(
    engine: ServingEngine, tokenizer: Tokenizer, request: GenerationRequest, stops: tuple[str, ...], use: ToolUse
) -> Choice:
    """The answer to a request with tools. Raises `InputError` where they cannot be used as it asks."""
    features = tokenizer.features
    features.check_tools(parsed=True)
    form, begun = features.call_form, in_thought(tokenizer, request.prompt)
    assert form is not None
    if use.forced:
        grammar = call_grammar(use.callable, form, begun, use.parallel)
        vocabulary = engine.model.config.vocab_size
        held = Constraint.of(grammar, tokenizer, vocabulary, request.end_ids, "tool_choice")
        request = replace(request, constraint=held)
    after_calls = "stop" if use.name is not None else "tool_calls"  # as OpenAI's for a named tool
    return Choice(request, stops, lambda: AnswerParser(use.tools, form, begun, use.parallel), after_calls)


def text_choices(engine: ServingEngine, body: CompletionBody, limits: Limits) -> list[Choice]:
    """The continuation of each prompt of a completion request. Raises `InputError`."""
    for prompt in body.prompts:
        if isinstance(prompt, str):
            limits.check_texts([prompt])
        else:
            limits.check_ids(prompt)
    sampling = body.sampling()
    prompts = [engine.prompt_ids(prompt) for prompt in body.prompts]
    most = [_room(engine, ids, body.max_tokens, ANSWER_TOKENS) for ids in prompts]
    return [Choice(engine.request(ids, n, sampling), body.stops) for ids, n in zip(prompts, most, strict=True)]


def _room(engine: ServingEngine, ids: PromptIds, most: int | None, usual: int) -> int:
    """Most tokens of an answer: as requested, or the default as far as the context allows."""
    return max(1, min(usual, engine.context - len(ids))) if most is None else most
