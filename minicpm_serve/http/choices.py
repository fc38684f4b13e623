"""From the body of a request to the answers that it asks of the engine."""

import itertools
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from minicpm_data.conversation.answers import AnswerParser
from minicpm_data.conversation.call_grammar import call_grammar
from minicpm_data.generation.constraint import Constraint
from minicpm_data.generation.image_prompt import ImagePrompt, chat_prompt
from minicpm_data.generation.options import ANSWER_TOKENS, CHAT_TOKENS
from minicpm_data.generation.request import GenerationRequest, PromptIds
from minicpm_data.generation.thinking import in_thought, parser_of
from minicpm_data.generation.token_scores import TokenScore
from minicpm_data.tokenizer.chat_template import variables_of
from minicpm_data.tokenizer.tokenizer import Tokenizer
from minicpm_serve.engine import ServingEngine
from minicpm_serve.http.answers import Answer
from minicpm_serve.http.limits import Limits
from minicpm_serve.http.logprobs import ChatLog, TextLog, TokenLog
from minicpm_serve.http.response_format import Format
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
        log: makes the log of the probabilities of one answer, or None where they are not asked for.
        begin: the text of the prompt, with which the answer begins.
        ends: nothing is generated after the prompt.
        scores: of the tokens of the prompt but the first, where they are part of the answer.
    """

    request: GenerationRequest
    stop: tuple[str, ...]
    parser: Callable[[], AnswerParser | None] = lambda: None
    after_calls: str = "tool_calls"
    log: Callable[[], TokenLog | None] = lambda: None
    begin: str = ""
    ends: bool = False
    scores: tuple[TokenScore, ...] | None = None

    def answer(self) -> Answer:
        """A new answer."""
        of_images = isinstance(self.request.prompt, ImagePrompt)
        answer = Answer(self.after_calls, of_images, self.log(), self.begin)
        if answer.log is not None and self.scores is not None:
            for token, score in zip(self.request.prompt, (None, *self.scores), strict=True):
                answer.log.add(token, score)
        return answer

    def scoring(self, engine: ServingEngine) -> "Future[list[TokenScore]] | None":
        """The scores of the prompt's tokens, where they are part of the answer."""
        if not self.begin or self.request.logprobs is None:
            return None
        return engine.prompt_scores(self.request.prompt, self.request.logprobs, self.request.adapter)

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
    limits.check_messages(body.messages)
    messages, use = body.plain(limits.images), body.tool_use()
    variables = body.chat_template_kwargs or {}
    if body.format is not None and use.tools:
        raise InputError("does not go with tools; leave one of them out.", option=body.format.option)
    held = use.forced or body.format is not None
    if held and tokenizer.features.thinking:  # unless it is asked for, no thought precedes the call or the format
        variables = {"enable_thinking": False, **variables}
    ids = chat_ids(engine, messages, variables, use.tools, limits)
    thinks = variables.get("enable_thinking")
    usual = tokenizer.sampling.of(thinks if isinstance(thinks, bool) else None)
    sampling = body.sampling(temperature=usual.temperature, top_p=usual.top_p)
    most = _room(engine, ids, body.most_tokens, CHAT_TOKENS)
    request = engine.request(ids, most, sampling, body.thinking_budget)
    request = _formatted(engine, replace(request, logprobs=body.described), body.format)
    ends = request.end_ids
    log = (lambda: None) if body.described is None else (lambda: ChatLog(tokenizer, ends))
    stops = (*body.stops, *(tokenizer.turn_markers if body.format is None else ()))  # a held text ends where it may
    if not use.tools:
        return [Choice(request, stops, lambda: parser_of(tokenizer, ids), log=log)]
    return [replace(_with_tools(engine, tokenizer, request, stops, use), log=log)]


def chat_ids(
    engine: ServingEngine,
    messages: list[dict[str, Any]],
    variables: dict[str, Any],
    tools: tuple[Any, ...],
    limits: Limits,
    **how: bool,
) -> PromptIds:
    """The prompt of a chat. ``how``: as for `Tokenizer.apply_chat`. Raises `InputError`."""
    tokenizer, config = engine.tokenizer, engine.model.config
    assert tokenizer is not None
    given = [json.dumps(variables, ensure_ascii=False)] if variables else []  # they are part of the prompt
    limits.check_texts([*itertools.chain.from_iterable(map(_texts, messages)), *given])
    asking = [name for name, value in variables.items() if value not in (None, False)]
    template = (tools and tokenizer.tool_template) or tokenizer.chat_template
    if asking and (unknown := set(asking) - variables_of(template)):
        raise InputError(f"the model's chat template knows no variable {short(min(unknown))!r}; leave it out.")
    more = {} if limits.images is None else {"max_slices": limits.images.max_slices, "room": limits.context}
    return chat_prompt(tokenizer, config, messages, tools=tools or None, variables=variables, **more, **how)


def _texts(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message's content."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _formatted(engine: ServingEngine, request: GenerationRequest, asked: Format | None) -> GenerationRequest:
    """The request held to a format. Raises `InputError` where the format cannot be held."""
    if asked is None:
        return request
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise InputError("needs a tokenizer, and this checkpoint has none.", option=asked.option)
    begun = parser_of(tokenizer, request.prompt) is not None and in_thought(tokenizer, request.prompt)
    grammar = asked.grammar(begun)
    vocabulary = engine.model.config.vocab_size
    held = Constraint.of(grammar, tokenizer, vocabulary, request.end_ids, asked.option)
    return replace(request, constraint=held)


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
    sampling, tokenizer = body.sampling(), engine.tokenizer
    if tokenizer is None and (body.echo or body.described is not None):
        raise InputError("needs a tokenizer, and this checkpoint has none.", "echo" if body.echo else "logprobs")
    prompts = [engine.prompt_ids(prompt) for prompt in body.prompts]
    most = [_room(engine, ids, body.max_tokens or (1 if body.ends else None), ANSWER_TOKENS) for ids in prompts]
    requests = [engine.request(ids, n, sampling) for ids, n in zip(prompts, most, strict=True)]
    choices = [Choice(_formatted(engine, request, body.format), body.stops) for request in requests]
    if tokenizer is not None and body.described is not None:
        choices = [
            replace(each, request=replace(each.request, logprobs=body.described), log=lambda: TextLog(tokenizer))
            for each in choices
        ]
    if tokenizer is not None and body.echo:
        said = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in body.prompts]
        choices = [replace(each, begin=text, ends=body.ends) for each, text in zip(choices, said, strict=True)]
    return choices


def _room(engine: ServingEngine, ids: PromptIds, most: int | None, usual: int) -> int:
    """Most tokens of an answer: as requested, or the default as far as the context allows."""
    return max(1, min(usual, engine.context - len(ids))) if most is None else most
