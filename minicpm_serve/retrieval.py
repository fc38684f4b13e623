"""Write training samples for the needle tasks of InfiniteBench (arXiv 2402.13718; OpenBMB/InfiniteBench on GitHub).

    python -m minicpm_serve.retrieval --task passkey --lengths 160 256 --num-samples 100 --save-path train.jsonl

A needle is hidden in irrelevant text, and the model is asked for it: a pass key of 5 digits (``passkey``), a sequence
of 10 digits in which half repeat their neighbor (``number_string``), or the value of one key among many
(``kv_retrieval``). Wording, answer lengths and scoring are the benchmark's, so that scores can be compared. The samples
are generated from a seed, with lengths counted in the tokenizer's tokens. Their needles never occur in an evaluation.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated

from minicpm_serve.evaluation.needles import TASKS, TaskName, make_sample
from weights_io.command_line import Former
from weights_io.errors import InputError
from weights_io.files.partial import partial
from weights_io.progress import progress_bar

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    save_path: Annotated[Path, Former("out")]
    """The .jsonl file to write, with {"prompt": ..., "completion": ...} in each line."""
    tokenizer: str | None = None
    """Model whose tokenizer counts tokens: folder, GGUF file, hub id or short name (default: the built-in model)."""
    task: TaskName = "passkey"
    """passkey: 5 digits; number_string: a sequence of 10 digits; kv_retrieval: a value of a JSON object."""
    lengths: tuple[int, int] = (512, 4096)
    """Minimum and maximum number of tokens of a prompt with its answer. Each sample's length is random."""
    num_samples: Annotated[int, Former("samples")] = 2000
    """Number of samples, one per line."""
    seed: int = 0
    """Seed of the needles, depths and lengths."""


def main(options: Options) -> None:
    """Write retrieval samples for training. Their needles never occur in an evaluation."""
    shortest, longest = options.lengths
    if options.num_samples < 1:
        raise InputError(f"is {options.num_samples}; it must be at least 1.", option="num_samples")
    if shortest > longest:
        raise InputError(f"{shortest} {longest} run backwards; give the least first.", option="lengths")
    encode = _tokenizer(options.tokenizer).encode
    space = TASKS[options.task].space
    make_sample(options.task, encode, shortest, 0.0, "shortest", False)  # raises before the file is created
    options.save_path.parent.mkdir(parents=True, exist_ok=True)
    tokens = 0
    with (
        partial(options.save_path) as path,
        path.open("w", encoding="utf-8") as file,
        progress_bar("writing", options.num_samples, unit="sample") as bar,
    ):
        for i in range(options.num_samples):
            random = Random(f"{options.seed} {i}")
            length, depth = random.randint(shortest, longest), random.random()
            sample = make_sample(options.task, encode, length, depth, f"{options.seed} {i}", False)
            line = {"prompt": sample.prompt, "completion": f"{space}{sample.answer}{'.' if space else ''}"}
            file.write(json.dumps(line) + "\n")
            tokens += len(sample.ids)
            bar.update()
    print(f"{options.save_path}: {options.num_samples} samples of {options.task}, {tokens:,} tokens of prompts")


def _tokenizer(path_or_repo: str | None) -> "Tokenizer":
    """The tokenizer of any model, without its config; a folder with only tokenizer files is enough."""
    from minicpm_data.tokenizer.folder import load_tokenizer
    from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
    from weights_io.checkpoint import open_checkpoint
    from weights_io.hub import resolve

    path = resolve(path_or_repo, weights=False)
    tokenizer = load_tokenizer(path) if path.is_dir() else tokenizer_of(open_checkpoint(path))
    if tokenizer is None:
        raise InputError(f"{path_or_repo} holds no tokenizer; give a model folder with one.")
    return tokenizer


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m minicpm_serve.retrieval")
