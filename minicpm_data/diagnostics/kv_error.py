"""Measure how far a quantized key/value cache moves the logits: a text runs through it and through the plain cache.

Both runs get the same tokens, whatever they would have chosen (teacher forcing), one chunk at a time.
Dims: T tokens of a chunk, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from minicpm_data.generation.api import Backend
from minicpm_data.generation.options import CacheOptions
from minicpm_data.generation.request import ModelT
from minicpm_data.model_options import ModelOptions, load_model, open_early
from weights_io import command_line
from weights_io.errors import InputError, not_utf8
from weights_io.progress import progress_bar

PIECE = 128  # tokens of a chunk; [128, 122753] float64 logits are 126 MB


@dataclass(frozen=True)
class Options(ModelOptions):
    prompt: str | None = None
    """The text, taken as it is, without the chat template."""
    data: Path | None = None
    """A UTF-8 file with the text, in place of --prompt."""
    max_tokens: int = 1024
    """Only so many of the text's first tokens."""
    kv_bits: Literal[4, 8] = 8
    """Of the cache that is compared with the plain one (JAX: 8)."""
    kv_group_size: int | None = None
    """Numbers that share a scale in MLX; by default 64, or 32 where 64 does not divide a head."""

    def text(self) -> str:
        if (self.prompt is None) == (self.data is None):
            raise InputError("the text is missing or given twice; give either --prompt or --data.")
        if self.data is None:
            return self.prompt or ""
        try:
            return self.data.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(self.data, error) from None


# model, ids and the options of the cache -> logits [T, V], one chunk after the other
Logits = Callable[[ModelT, list[int], CacheOptions], Iterator[np.ndarray]]


@dataclass
class Difference:
    """How the logits differ from those of the plain cache, over ``tokens`` positions."""

    tokens: int
    deviation: float  # standard deviation of the plain logits at a position, root mean square over positions
    largest: float
    rms: float
    divergence: float  # mean KL(plain || other) of the next token's distribution, in nats
    same: int  # positions whose most likely token is the same


def run(
    backend: Callable[[], Backend[ModelT]], logits: Logits[ModelT], prog: str, options: type[Options] = Options
) -> None:
    """Run the command ``python -m PACKAGE.kv_error``.

    Arguments:
        backend: returns the backend. It is called, and so the backend is imported, only when the flags are valid.
        logits: runs a model over ids.
        prog: the name of the command.
        options: the backend's class of options.

    Raises:
        SystemExit: with 2, after a printed sentence, if an option is wrong or the text is empty.
    """

    def main(options: Options) -> None:
        """Say how far a quantized key/value cache moves the logits of a text."""
        text, most = options.text(), options.max_tokens
        if most < 1:
            raise InputError(f"is {most}; it must be at least 1.", option="max_tokens")
        packed = CacheOptions(kv_bits=options.kv_bits, kv_group_size=options.kv_group_size)
        here = open_early(options)
        model, tokenizer = load_model(backend(), options, source=here)
        ids = tokenizer.encode(text)[:most]
        if not text or not ids:
            raise InputError("the text is empty; give some with --prompt or --data.")
        with progress_bar("comparing", len(ids), unit="token") as bar:

            def told(chunk: np.ndarray) -> np.ndarray:
                bar.update(len(chunk))
                return chunk

            found = compare(map(told, logits(model, ids, CacheOptions())), logits(model, ids, packed))
        print("\n".join(lines(found, options.kv_bits)))

    command_line.run(main, options, prog)


def compare(plain: Iterable[np.ndarray], other: Iterable[np.ndarray]) -> Difference:
    """The difference between two runs, each given as chunks of logits [T, V]."""
    tokens = same = 0
    largest = squares = variances = divergence = 0.0
    for expected, found in zip(plain, other, strict=True):
        difference = found.astype(np.float64) - expected
        p, q = _log_softmax(expected), _log_softmax(found)
        tokens += len(expected)
        largest = max(largest, float(np.abs(difference).max()))
        squares += float(np.square(difference).mean(axis=-1).sum())
        variances += float(expected.var(axis=-1, dtype=np.float64).sum())
        divergence += float((np.exp(p) * (p - q)).sum())
        same += int((expected.argmax(axis=-1) == found.argmax(axis=-1)).sum())
    return Difference(
        tokens, (variances / tokens) ** 0.5, largest, (squares / tokens) ** 0.5, divergence / tokens, same
    )


def lines(found: Difference, bits: int) -> list[str]:
    """The lines of the report that is printed."""
    table = {
        "text": f"{found.tokens} tokens; a cache of {bits} bits against the plain one",
        "logits": f"standard deviation {found.deviation:.4g}",
        "largest error": f"{found.largest:.4g}, {found.largest / found.deviation:.2%} of the standard deviation",
        "rms error": f"{found.rms:.4g}, {found.rms / found.deviation:.2%} of the standard deviation",
        "KL divergence": f"{found.divergence:.3g} nats a token",
        "same top token": f"{found.same} of {found.tokens}, {found.same / found.tokens:.1%}",
    }
    return [f"{name:16} {value}" for name, value in table.items()]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
