"""Answer a file of prompts, as many at a time as the engine runs.

    python -m minicpm_serve.batch --backend mlx --model minicpm-2b --prompts prompts.txt --out answers.jsonl

A line of the file is a prompt, or a JSON object (``.jsonl``): ``{"prompt": ...}``, ``{"messages": [...]}`` or a request
of OpenAI's batch format. A run that was stopped is resumed by the same command.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from minicpm_data.generation.options import CacheOptions, Sampling
from minicpm_data.model_options import load_model, open_early
from minicpm_data.option_checks import check_range
from minicpm_serve import backends
from minicpm_serve.http.image_access import ImageOptions
from weights_io import command_line
from weights_io.cli.switches import Switch
from weights_io.command_line import Former
from weights_io.errors import InputError
from weights_io.progress import waiting

if TYPE_CHECKING:
    from minicpm_serve.batches.lines import Reader
    from minicpm_serve.batches.results import Results
    from weights_io.checkpoint import Checkpoint

# Options that decide the answers. A run with others does not go on with a file of results.
DECIDING = (
    *("backend", "model", "revision", "hub", "dtype", "adapter_path", "quantize", "head_bits", "rope_scaling"),
    *("max_tokens", "temp", "top_p", "top_k", "repetition_penalty", "seed", "system_prompt", "enable_thinking"),
    *("ignore_chat_template", "served_model_name", "kv_bits", "max_model_len", "max_slices"),
)


@dataclass(frozen=True, kw_only=True)
class Options(ImageOptions, backends.BackendOptions):
    prompts: Path
    """File of prompts. In a .jsonl file each line is an object: {"prompt": "..."}, {"messages": [...]}, or a request of
    OpenAI's batch format. Of any other file each line is a prompt."""
    out: Path
    """File of results, one JSON object a line, in the order in which answers are finished. If it exists, the run that
    wrote it is resumed."""
    max_tokens: int | None = None
    """Maximum number of tokens of an answer. By default 1024 in a chat and 256 without the chat template."""
    temp: Annotated[float | None, Former("temperature")] = None
    """Sampling temperature. 0: greedy decoding. By default the model's in a chat, and 0 without the chat template."""
    top_p: float | None = None
    """Sample from the most likely tokens whose probabilities add up to this. By default the model's in a chat."""
    top_k: int | None = None
    """Sample from this many most likely tokens. By default all."""
    repetition_penalty: float | None = None
    """Values above 1 make tokens of the prompt and the answer less likely to be repeated."""
    seed: int | None = None
    """Random seed; each line has its own. By default each run uses new seeds."""
    system_prompt: str | None = None
    """System message for the lines that have none."""
    enable_thinking: Annotated[bool | None, Switch()] = None
    """Let the model think before it answers, or not. By default its chat template decides."""
    ignore_chat_template: bool = False
    """Continue a prompt as raw text, without the chat template."""
    served_model_name: str | None = None
    """Name of the model in requests of OpenAI's batch format. By default that of --model, as it is given."""
    max_num_seqs: int | None = None
    """Maximum number of prompts that are answered at a time. By default 8."""
    max_model_len: int | None = None
    """Maximum number of tokens of a prompt and its answer. By default the model's context length, or less if even one
    request of that length does not fit in memory."""
    cache_tokens: int | None = None
    """Tokens that the key/value cache holds, of all requests together. By default as many as the memory allows."""
    kv_bits: Literal[8] | None = None
    """Bits of the quantized key/value cache (JAX)."""
    prefill_step_size: int = 512
    """Chunk size of a prompt in tokens. A smaller chunk takes less memory."""

    @property
    def name(self) -> str:
        return self.served_model_name or self.model or "pico"

    def reader(self, sees: bool) -> "Reader":
        """What a line asks where it does not say it itself. Raises `InputError` for a value out of range."""
        from minicpm_serve.batches.lines import Reader

        check_range(self, "max_tokens", least=1)
        fields = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repetition_penalty"}
        usual = {name: value for name, option in fields.items() if (value := getattr(self, option)) is not None}
        Sampling(**usual, seed=self.seed)
        usual = usual if self.max_tokens is None else {**usual, "max_tokens": self.max_tokens}
        thinking: dict[str, Any] = {}
        if self.enable_thinking is not None:
            thinking = {"chat_template_kwargs": {"enable_thinking": self.enable_thinking}}
        images = self.image_access()
        more = self.seed, self.system_prompt, self.ignore_chat_template, images if sees else None
        return Reader(self.name, usual, thinking, *more)

    def settings(self) -> dict[str, Any]:
        """What decides the results, beside the prompts."""
        return {name: getattr(self, name) for name in DECIDING}


def main(options: Options) -> None:
    """Answer a file of prompts, and write a file of results."""
    options.check_placement()
    check_range(options, "max_num_seqs", "max_model_len", "cache_tokens", "prefill_step_size", least=1)
    prompts, out = options.prompts, options.out
    if not prompts.is_file():
        raise InputError(f"is {prompts}, which is no file here; give a text file, or .jsonl.", "prompts")
    if out.is_dir() or not out.expanduser().absolute().parent.is_dir():
        raise InputError(f"is {out}, which is a folder or in one that does not exist; make it first.", "out")
    if out.exists() and out.samefile(prompts):
        raise InputError("is the file of {prompts}; give a new name.", "out", ["prompts"])
    if find_spec("fastapi") is None:
        raise InputError("a batch is read as the server reads requests: pip install 'minicpm-jax-mlx[serve]'.")
    here = open_early(options)
    # The slow imports come after whatever a user is likely to mistype.
    from minicpm_serve.batches.lines import survey
    from minicpm_serve.batches.results import digest, opened

    reader = options.reader(here is not None and here.config.vision is not None)
    with waiting(f"checking {prompts.name}"):
        count, last = survey(reader, prompts)
        settings = {"prompts": digest(prompts), **options.settings()}
    with opened(out, last, settings) as results:
        left = count - results.before
        if results.before:
            print(f"{results.before:,} of {count:,} prompts have an answer in {out}; {left:,} are left", flush=True)
        if left:
            answer(options, here, reader, results, left)


def answer(options: Options, here: "Checkpoint | None", reader: "Reader", results: "Results", left: int) -> None:
    """Load the model, and answer the lines that have no result. Exits with code 1 where some could not be answered."""
    from minicpm_serve.batches.running import Run
    from minicpm_serve.engine import ServingEngine
    from minicpm_serve.failure import end_if_failed

    backend = backends.get(options.backend)
    model, tokenizer = load_model(backend, options, decoding=True, source=here)
    cache = CacheOptions(kv_bits=options.kv_bits, prefill_step_size=options.prefill_step_size)
    limits = options.max_num_seqs, options.max_model_len, cache, options.cache_tokens
    with waiting("making room for the prompts"):
        engine = ServingEngine(options.backend, model, tokenizer, *limits, images=options.image_access())
    try:
        backend.device.warn_idle_axes(engine.model, engine.slots)
        run = Run(engine, options.name, results)
        run.answer(reader.lines(options.prompts), left)
    except Exception:
        end_if_failed(engine)  # the results so far are written, and the same command goes on
        raise
    finally:
        engine.close()
    print(f"{run.lines:,} prompts: {run.tokens:,} tokens, {run.rate:,.0f} tokens/s; results in {options.out}")
    if run.errors:
        print(f"{run.errors:,} of them have an error in place of an answer", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    command_line.run(main, Options, "python -m minicpm_serve.batch")
