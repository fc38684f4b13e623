"""The commands generate and chat of both backends: flags, output, and chat in a terminal."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from minicpm_data.cli.chat import Chat, Settings, greet
from minicpm_data.cli.generate_options import ChatOptions, GenerateOptions
from minicpm_data.cli.meter import Meter
from minicpm_data.cli.stored_prompt import Stored
from minicpm_data.cli.terminal import Conversation, complain, typed_lines
from minicpm_data.cli.thoughts import ShownThought
from minicpm_data.cli.wrapping import keys_unseen
from minicpm_data.diagnostics import sparsity
from minicpm_data.generation.api import Backend
from minicpm_data.generation.image_prompt import chat_prompt
from minicpm_data.generation.options import (
    Sampling,
)
from minicpm_data.generation.request import GenerationRequest, ModelT
from minicpm_data.generation.thinking import check_budget
from minicpm_data.model_options import load_model, note_context, open_early
from weights_io import command_line
from weights_io.errors import InputError, not_utf8
from weights_io.progress import awaited, waiting

if TYPE_CHECKING:
    from minicpm_data.generation.responses import Response


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
        images = options.images(None if here is None else here.config)
        running = backend()
        # The form for decoding does not let the layers be inspected.
        model, tokenizer = load_model(running, options, decoding=not options.report_sparsity, source=here)
        running.device.warn_idle_axes(model, 1)
        if options.report_sparsity:
            sparsity.checked_threshold(model.config)
        options.check_thinking(tokenizer)
        for token in chain(*options.extra_eos_token, stored.eos_tokens if stored else ()):
            tokenizer.add_eos_token(token)

        def encoded(prompt: str) -> Sequence[int]:
            if options.ignore_chat_template:
                return tokenizer.encode(prompt)
            begun = options.prefill_response is not None
            return chat_prompt(
                tokenizer,
                model.config,
                options.messages(prompt, images),
                tools=tools,
                enable_thinking=options.enable_thinking,
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
            if images:
                raise InputError("does not go with {image}; leave one of them out.", "report_sparsity", ["image"])
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

            def answer(prompt: Sequence[int], settings: Settings) -> "Iterator[Response]":
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
                Conversation(options.system_prompt, stored.text if stored else "", options.sight(model.config)),
                settings,
                tokenizer,
                model.config,
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
