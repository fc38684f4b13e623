"""The command cache_prompt of both backends: the keys and values of a prompt, in a file for later prompts."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minicpm_data.cli.generate import read_stdin
from minicpm_data.cli.generate_options import KVCacheOptions
from minicpm_data.cli.stored_prompt import fingerprint_of
from minicpm_data.generation.api import Backend
from minicpm_data.generation.prompt_cache import check_target, write_prompt_cache
from minicpm_data.generation.request import GenerationRequest, ModelT
from minicpm_data.model_options import ModelOptions, load_model, note_context, open_early
from weights_io import command_line
from weights_io.errors import InputError
from weights_io.progress import waiting


@dataclass(frozen=True, kw_only=True)
class CachePromptOptions(KVCacheOptions, ModelOptions):
    prompt: Annotated[str, tyro.conf.arg(aliases=("-p",))]
    """The beginning of a user message. - reads it from standard input."""
    prompt_cache_file: str
    """The .safetensors file to write."""
    eos_token: str | None = None
    """One more token that ends the answers of generate and chat."""
    ignore_chat_template: bool = False
    """Store the prompt as raw text, for generate --ignore-chat-template."""


def run_cache_prompt(
    backend: Callable[[], Backend[ModelT]], prog: str, options: type[CachePromptOptions] = CachePromptOptions
) -> None:
    """``python -m PACKAGE.cache_prompt``. ``backend`` is imported only when the flags are valid."""

    def main(options: CachePromptOptions) -> None:
        """Store the keys and values of a prompt, which generate and chat need not compute again."""
        options.check_placement()
        cache_options, target = options.cache_options(), check_target(Path(options.prompt_cache_file))
        prompt = read_stdin() if options.prompt == "-" else options.prompt
        if not prompt.strip():
            raise InputError("the prompt is empty; give the text to store.")
        here = open_early(options)
        named = fingerprint_of(options, here)
        running = backend()
        model, tokenizer = load_model(running, options, decoding=True, source=here)
        running.device.warn_idle_axes(model, 1)
        if options.eos_token is not None:
            tokenizer.add_eos_token(options.eos_token)
        if options.ignore_chat_template:
            ids = tokenizer.encode(prompt)
        else:
            message = {"role": "user", "content": prompt}
            ids = tokenizer.apply_chat([message], continue_final_message=True)
        if options.max_kv_size is not None and len(ids) > options.max_kv_size:
            raise InputError(
                f"is {options.max_kv_size}, less than the {len(ids)} tokens of the prompt, whose beginning would be "
                "lost; leave it out.",
                option="max_kv_size",
            )
        request = GenerationRequest.of(model, tokenizer, [ids], 1, cache=cache_options)
        running.generator.decoding.check(model, request)
        note_context(model.config, len(ids))
        began, compiled = time.perf_counter(), running.device.compile_seconds()
        with waiting(f"reading the prompt of {len(ids)} tokens"):
            found = running.generator.decoding.cached_prompt(model, request)
            compiled = running.device.compile_seconds() - compiled
            seconds = max(time.perf_counter() - began - compiled, 1e-9)
        with waiting(f"writing {target.name}"):
            name = options.model or "pico"
            write_prompt_cache(target, found, name, named, prompt, ids, options.eos_token)
        print(f"Processed {len(ids)} tokens ({len(ids) / seconds:.2f} tok/s)")
        print(f"Peak memory: {running.device.peak_memory() / 1e9:.3f} GB")
        print(f"{target}: {target.stat().st_size:,} bytes")

    command_line.run(main, options, prog)
