"""The commands generate and chat of both backends: flags, output, and chat in a terminal."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minicpm_data.cli.chat import Chat, Settings, greet
from minicpm_data.cli.meter import Meter
from minicpm_data.cli.stored_prompt import Stored
from minicpm_data.cli.terminal import Conversation, complain, typed_lines
from minicpm_data.cli.thoughts import ShownThought
from minicpm_data.cli.wrapping import keys_unseen
from minicpm_data.diagnostics import sparsity
from minicpm_data.generation.api import Backend
from minicpm_data.generation.options import (
    ANSWER_TOKENS,
    CHAT_TOKENS,
    CacheOptions,
    Sampling,
)
from minicpm_data.generation.request import GenerationRequest, ModelT
from minicpm_data.generation.responses import stop_strings
from minicpm_data.generation.speculation import Source, Speculation
from minicpm_data.generation.thinking import check_budget, check_thinks
from minicpm_data.model_options import ModelOptions, load_model, note_context, open_early
from minicpm_data.sampling_defaults import OF_CHAT, SamplingDefaults
from weights_io import command_line
from weights_io.cli.switches import Switch
from weights_io.command_line import Former, Unneeded
from weights_io.errors import InputError, not_utf8
from weights_io.progress import awaited, waiting

if TYPE_CHECKING:
    from minicpm_data.generation.responses import Response
    from minicpm_data.tokenizer.tokenizer import Tokenizer

# "--stop a b", "--stop a --stop b", or both.
Texts = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT [TEXT ...]")]


@dataclass(frozen=True)
class SamplingOptions:
    temp: Annotated[float | None, Former("temperature")] = 0.0
    """Temperature; 0 takes the likeliest token."""
    top_p: float | None = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample from the K likeliest tokens. 0 samples from all tokens."""
    min_p: float = 0.0
    """Exclude tokens whose probability is below this fraction of the likeliest token's probability."""
    min_tokens_to_keep: int = 1
    """Number of the likeliest tokens that --min-p never excludes."""
    xtc_probability: float = 0.0
    """How often a token is sampled with XTC, which excludes the likeliest choices: 0 is never, 1 is always."""
    xtc_threshold: float = 0.1
    """XTC excludes the tokens above this probability, except the least likely of them."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens of the prompt and the answer less likely to be repeated."""
    seed: int | None = None
    """Random seed. The same seed gives the same answer. By default each run uses a new seed."""
    system_prompt: str | None = None
    """System message before the first question."""
    stop: Texts = ()
    """Texts that end the answer. They are not printed."""

    def stops(self, *more: str) -> tuple[str, ...]:
        """The texts of --stop, checked, and ``more``."""
        return stop_strings([*chain(*self.stop), *more])

    def sampling(self, defaults: SamplingDefaults = OF_CHAT) -> Sampling:
        """The sampling parameters, with the defaults of a model where no temperature or top-p is given."""
        return Sampling(
            temperature=defaults.temperature if self.temp is None else self.temp,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            min_tokens_to_keep=self.min_tokens_to_keep,
        )


@dataclass(frozen=True)
class ThinkingOptions:
    enable_thinking: Annotated[bool | None, Switch()] = None
    """Let the model think before it answers, or not. By default its chat template decides."""
    thinking_budget: int | None = None
    """Maximum number of tokens of a thought. It is then closed, and the answer begins."""
    show_thinking: Annotated[bool | None, Switch()] = None
    """Print the thought too, or not. By default it is printed on a terminal only."""

    def check_thinking(self, tokenizer: "Tokenizer") -> None:
        """Raises `InputError` where the chat template does not think, and an option asks for it."""
        if self.enable_thinking:
            check_thinks(tokenizer, "enable_thinking")
        if self.thinking_budget is not None:
            check_thinks(tokenizer, "thinking_budget")


@dataclass(frozen=True)
class KVCacheOptions:
    kv_bits: Literal[4, 8] | None = None
    """Bits of the quantized key/value cache (JAX: 8)."""
    kv_group_size: int | None = None
    """Group size of --kv-bits. MLX: 64 by default, or 32 if the head dimension is not a multiple of 64. JAX: a head."""
    quantized_kv_start: int = 0
    """Quantize the cache of --kv-bits once it holds this many tokens (MLX). By default from the first token on."""
    max_kv_size: int | None = None
    """Maximum number of tokens in the cache: the first 4 and the latest ones (MLX)."""
    prefill_step_size: int = 512
    """Chunk size of the prompt in tokens. A smaller chunk takes less memory."""

    def cache_options(self) -> CacheOptions:
        return CacheOptions(**{field.name: getattr(self, field.name) for field in fields(KVCacheOptions)})


@dataclass(frozen=True)
class GenerateOptions(KVCacheOptions, ThinkingOptions, SamplingOptions, ModelOptions):
    prompt_cache_file: str | None = None
    """File of cache_prompt. Its text comes before the prompt, and need not be computed again."""
    prompt: Annotated[str, tyro.conf.arg(aliases=("-p",))] = "Hello!"
    """The prompt. - reads it from standard input."""
    max_tokens: Annotated[int, tyro.conf.arg(aliases=("-m",))] = ANSWER_TOKENS
    """Maximum number of tokens of the answer."""
    ignore_chat_template: bool = False
    """Continue the prompt as raw text, without the chat template."""
    prefill_response: str | None = None
    """Text that the answer begins with. Only the model's continuation is printed."""
    chat_template_config: str | None = None
    """Additional variables for the chat template, as a JSON object."""
    extra_eos_token: Texts = ()
    """Additional tokens that end the answer, such as <|im_end|>."""
    use_default_chat_template: Annotated[
        bool, tyro.conf.Suppress, Unneeded("a model without a chat template gets a default one")
    ] = False
    """Accepted for scripts of mlx_lm; it changes nothing, as a model without a chat template gets a default one."""
    draft_model: str | None = None
    """Smaller model with the same tokenizer that guesses the next tokens. The answer is the same, and comes sooner."""
    num_draft_tokens: int = 3
    """Number of tokens that are guessed at a time."""
    prompt_lookup: bool = False
    """Find the last tokens earlier in the text, and guess that the same tokens follow. Speeds up repetitive text."""
    verbose: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Print speed and memory at the end."""
    report_sparsity: bool = False
    """At the end, print the fraction of MLP neurons that the activation sets to 0 over prompt and answer, before the
    product with up_proj. For models with relu or fatrelu, such as MiniCPM-S-1B."""

    def speculation(self, draft_model: Source | None) -> Speculation[Source]:
        """The options of speculative decoding. ``draft_model``: the name from the flag, or the loaded model."""
        return Speculation(draft_model, self.prompt_lookup, self.num_draft_tokens)

    def template_variables(self) -> dict[str, Any]:
        """The object of --chat-template-config. Raises `InputError` for a wrong value, and for flags of the template
        together with --ignore-chat-template."""
        for name in ("system_prompt", "prefill_response", "chat_template_config", "enable_thinking"):
            if self.ignore_chat_template and getattr(self, name) is not None:
                raise InputError(
                    f"needs the chat template; leave out {{ignore_chat_template}} or {{{name}}}.",
                    option=name,
                    others=["ignore_chat_template", name],
                )
        try:
            variables = json.loads(self.chat_template_config or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"is not JSON ({error}); give an object.", option="chat_template_config") from None
        if not isinstance(variables, dict):
            raise InputError('--chat-template-config must be a JSON object such as {"enable_thinking": false}.')
        return variables

    def messages(self, prompt: str) -> list[dict[str, str]]:
        begun = [] if self.prefill_response is None else [{"role": "assistant", "content": self.prefill_response}]
        return [*_system(self), {"role": "user", "content": prompt}, *begun]


@dataclass(frozen=True)
class ChatOptions(KVCacheOptions, ThinkingOptions, SamplingOptions, ModelOptions):
    prompt_cache_file: str | None = None
    """File of cache_prompt. Its text comes before the first question, and need not be computed again."""
    temp: Annotated[float | None, Former("temperature")] = None
    """Temperature; 0 takes the likeliest token. By default the model's own, which inspect shows."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability. By default the model's own."""
    max_tokens: Annotated[int, tyro.conf.arg(aliases=("-m",))] = CHAT_TOKENS
    """Maximum number of tokens of an answer, with its thought."""


def run_generate(
    backend: Callable[[], Backend[ModelT]], prog: str, options: type[GenerateOptions] = GenerateOptions
) -> None:
    """``python -m PACKAGE.generate``. ``backend`` is imported only when the flags are valid."""

    def main(options: GenerateOptions) -> None:
        """Answer a prompt with a MiniCPM (or Llama) model."""
        options.check_placement()
        sampling, max_tokens, stops = options.sampling(), _positive(options.max_tokens), options.stops()
        if options.thinking_budget is not None:
            check_budget(options.thinking_budget)
        _note_unused(sampling)
        variables, cache_options = options.template_variables(), options.cache_options()
        tools = variables.pop("tools", None)
        options.speculation(options.draft_model)  # checks the range before anything is loaded
        prompt = read_stdin() if options.prompt == "-" else options.prompt
        if not prompt.strip():
            raise InputError("the prompt is empty; ask something.")
        here = open_early(options)
        stored = Stored.opened(options, here)
        if stored is not None:
            stored.check_sampling(sampling, options.draft_model)
            cache_options = stored.file.cache_options(cache_options)
        drafting = (
            None
            if options.draft_model is None
            else replace(options, model=options.draft_model, revision=None, adapter_path=None, rope_scaling=None)
        )
        drafter = None if drafting is None else open_early(drafting)
        running = backend()
        # The form for decoding does not let the layers be inspected.
        model, tokenizer = load_model(running, options, decoding=not options.report_sparsity, source=here)
        running.device.warn_idle_axes(model, 1)
        if options.report_sparsity:
            sparsity.checked_threshold(model.config)
        options.check_thinking(tokenizer)
        for token in chain(*options.extra_eos_token, stored.eos_tokens if stored else ()):
            tokenizer.add_eos_token(token)

        def encoded(prompt: str) -> list[int]:
            if options.ignore_chat_template:
                return tokenizer.encode(prompt)
            begun = options.prefill_response is not None
            return tokenizer.apply_chat(
                options.messages(prompt),
                tools,
                options.enable_thinking,
                continue_final_message=begun,
                variables=variables,
            )

        ids = encoded(prompt) if stored is None else stored.ids(prompt, encoded)
        if not options.ignore_chat_template:
            stops = options.stops(*tokenizer.turn_markers)
        draft = None
        if drafting is not None:
            draft, _ = load_model(running, drafting, decoding=True, source=drafter)
        meter = Meter(running.device)
        request = GenerationRequest.of(
            model, tokenizer, [ids], max_tokens, sampling, cache_options, options.thinking_budget
        )
        if stored is not None:
            request = stored.begun(model.config, request)
        answer = running.generator.stream(model, tokenizer, request, stops, options.speculation(draft))
        left = len(ids) - request.begun
        print_answer(awaited(f"reading the prompt of {left} tokens", meter.watch(answer)), options.show_thinking)
        said = [meter.report(left)] if options.verbose else []
        if options.report_sparsity:
            run = [*ids, *meter.tokens[:-1]]  # the model never saw the last token
            with waiting("counting neurons"):
                said.append(sparsity.line(running.activation_sparsity(model, run)))
        if running.device.is_first():
            note_context(model.config, len(ids) + len(meter.tokens), rescaled=options.rescaled)
            print(*said, sep="\n", end="\n" if said else "", file=sys.stderr)

    command_line.run(main, options, prog)


def run_chat(backend: Callable[[], Backend[ModelT]], prog: str, options: type[ChatOptions] = ChatOptions) -> None:
    """``python -m PACKAGE.chat``; ``backend`` as in `run_generate`."""

    def main(options: ChatOptions) -> None:
        """Chat with a MiniCPM (or Llama) model. /help lists the commands of the chat."""
        cache_options = options.cache_options()
        options.sampling()  # checks the ranges before anything is loaded
        max_tokens, _ = _positive(options.max_tokens), options.stops()
        if options.thinking_budget is not None:
            check_budget(options.thinking_budget)
        here = open_early(options)
        stored = Stored.opened(options, here)
        if stored is not None:
            stored.check_chat()
            cache_options = stored.file.cache_options(cache_options)
        with keys_unseen():  # what is typed while a model loads or answers belongs to the next question
            running = backend()
            model, tokenizer = load_model(running, options, decoding=True, source=here)
            running.device.warn_idle_axes(model, 1)
            # An option that the backend lacks is refused now, and not after each question.
            options.check_thinking(tokenizer)
            sampling = options.sampling(tokenizer.sampling.of(options.enable_thinking))
            _note_unused(sampling)
            running.generator.decoding.check(
                model, GenerationRequest.of(model, tokenizer, [[0]], 1, sampling, cache_options)
            )
            stops, warming = options.stops(*tokenizer.turn_markers), running.generator.decoding.warming(model)
            for token in stored.eos_tokens if stored else ():
                tokenizer.add_eos_token(token)

            def answer(prompt: list[int], settings: Settings) -> "Iterator[Response]":
                most, budget = settings.max_tokens, settings.thinking_budget
                request = GenerationRequest.of(
                    model, tokenizer, [prompt], most, settings.sampling, cache_options, budget
                )
                if stored is not None:
                    request = stored.begun(model.config, request)
                warming.claim(request)
                count = 0
                for response in running.generator.stream(model, tokenizer, request, stops):
                    count += response.token is not None
                    yield response
                if sys.stdin.isatty():  # otherwise the next question is there already
                    warming.follow(request, count)

            def note(tokens: int) -> bool | None:
                return note_context(model.config, tokens, " (/reset begins anew)", options.rescaled)

            own = {
                name for name, given in (("temperature", options.temp), ("top_p", options.top_p)) if given is not None
            }
            settings = Settings(sampling, max_tokens, options.enable_thinking, options.thinking_budget, own)
            chat = Chat(
                Conversation(options.system_prompt, stored.text if stored else ""),
                settings,
                tokenizer,
                answer,
                lambda: Meter(running.device),
                note,
                options.show_thinking,
            )
            greet(options.model or "pico", running.device.description())
            try:
                for line in typed_lines():
                    try:
                        if not chat.take(line):
                            return
                    except InputError as error:
                        complain(error)
                    except KeyboardInterrupt:  # a second Ctrl-C, while the first one was ending the answer
                        print()
            finally:
                with waiting("ending the compilation"):
                    warming.close()

    command_line.run(main, options, prog)


def print_answer(answer: "Iterable[Response]", show_thinking: bool | None) -> None:
    """Print an answer as it arrives, the thought before it if it is to be shown; its length goes to standard error."""
    thought = ShownThought(show_thinking)

    def end() -> None:
        print(thought.end(), end="", flush=True)
        print(thought.length(), file=sys.stderr)

    try:
        for response in answer:
            before, reasoning = thought.take(response)
            print(before, reasoning, sep="", end="", flush=True)
            if response.text:
                if thought.open:
                    end()
                print(response.text, end="", flush=True)
    finally:
        if thought.open:
            end()
    print()


def _note_unused(sampling: Sampling) -> None:
    """Print a note about flags that change nothing, because nothing is sampled."""
    if sampling.greedy and sampling.excludes:
        print("note: --temp 0 takes the likeliest token, so --xtc-probability changes nothing", file=sys.stderr)


def _system(options: SamplingOptions) -> list[dict[str, str]]:
    return [] if options.system_prompt is None else [{"role": "system", "content": options.system_prompt}]


def _positive(max_tokens: int) -> int:
    if max_tokens < 1:
        raise InputError(f"is {max_tokens}; it must be at least 1.", option="max_tokens")
    return max_tokens


def read_stdin() -> str:
    """The text on standard input. Raises `InputError` where it is closed or no text."""
    if sys.stdin is None:
        raise InputError("standard input is closed; give the prompt with --prompt.")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8("standard input", error) from None
