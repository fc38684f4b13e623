"""Perplexity of a model on texts or conversations.

    python -m minicpm_serve.perplexity --backend mlx --model minicpm-2b --data-path texts.jsonl

The documents are put one after the other in random order, and cut into samples of ``--sequence-length`` tokens, as by
mlx_lm.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from minicpm_data.model_options import load_model
from minicpm_data.option_checks import check_range
from minicpm_serve import backends
from minicpm_serve.evaluation.perplexity import Perplexity, read_texts, samples, token_losses
from weights_io.command_line import Former
from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Options(backends.BackendOptions):
    data_path: Annotated[Path, Former("data")]
    """A text file, a .jsonl or .json file with a text or a conversation in each line (the formats of training data),
    or a folder with train.jsonl."""
    sequence_length: int = 512
    """Tokens of a sample."""
    num_samples: int = 256
    """Maximum number of samples. -1 takes all."""
    batch_size: int = 8
    """Samples in a batch."""
    seed: int = 123
    """Seed of the order of the documents."""


def main(options: Options) -> None:
    """Measure the perplexity of a model on texts or conversations."""
    options.check_placement()
    check_range(options, "sequence_length", least=2)
    check_range(options, "batch_size", least=1)
    if options.num_samples == 0 or options.num_samples < -1:
        raise InputError(f"is {options.num_samples}; it must be at least 1, or -1 for all.", "num_samples")
    path = found(options.data_path)
    backend = backends.get(options.backend)
    model, tokenizer = load_model(backend, options)
    backend.device.warn_idle_axes(model, options.batch_size)
    rows = samples(encoded(path, tokenizer), options.sequence_length, options.num_samples, options.seed)
    if len(rows[0]) < 2:
        raise InputError(f"is {path}, which has fewer than two tokens; give more text.", "data_path")
    print(f"{len(rows)} samples of {len(rows[0])} tokens of {path.name}", flush=True)
    began, compiled = time.perf_counter(), backend.device.compile_seconds()
    losses = token_losses(options.backend, model, rows, len(rows[0]), min(options.batch_size, len(rows)))
    compiling = backend.device.compile_seconds() - compiled
    seconds = max(time.perf_counter() - began - compiling, 1e-9)
    result = Perplexity.of(losses)
    print(f"Perplexity: {result.value:.3f} ± {result.error:.3f}")
    print(f"Loss: {losses.mean():.4f} nats per token")
    print(f"Evaluation time: {seconds:.2f} seconds" + (f", and {compiling:.1f} to compile" if compiling else ""))
    print(f"Tokens per second: {losses.size / seconds:.0f}")
    print(f"Peak memory: {backend.device.peak_memory() / 1e9:.2f} GB on {backend.device.description()}")


def found(path: Path) -> Path:
    """The file with the documents. Raises `InputError` where there is none."""
    from minicpm_data.datasets.examples import find_split

    if not path.exists():
        raise InputError(f"is {path}, which is no file here; download a dataset first, as .jsonl or text.", "data_path")
    split = find_split(path, "train")
    assert split is not None
    return split


def encoded(path: Path, tokenizer: "Tokenizer") -> list[list[int]]:
    """The token ids of each document of a file. Raises `InputError` for a file that is neither text nor JSON."""
    from minicpm_data.datasets.examples import make_example
    from minicpm_data.datasets.jsonl import read_items

    if path.suffix in (".jsonl", ".json"):
        return read_items(path, lambda document: [int(i) for i in make_example(document, tokenizer, False).ids])
    return [tokenizer.encode(text) for text in read_texts(path)]


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m minicpm_serve.perplexity")
