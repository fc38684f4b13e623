"""Fine-tuning data: the forms that a line may have, and the tokens of each that are trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from minicpm_data.tokenizer import Tokenizer

SplitName = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class Example:
    """A conversation or a text. BOS comes first where the tokenizer adds it; the first token is never trained, as
    nothing predicts it."""

    ids: np.ndarray  # [T] int32
    trained: np.ndarray  # [T] bool: which tokens are targets


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; the answer and its EOS are ``trained``."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class Split:
    """The examples of one file."""

    path: Path
    examples: list[Any]  # of Example, or of Pair
    dropped: int  # examples of whose trained tokens none lies within the window
    cut: int  # examples cut at the window's end

    def summary(self) -> str:
        """One line for the user: how many examples and tokens, and what the window cost."""
        raise NotImplementedError


def load_split(
    data: Path,
    split: SplitName,
    tokenizer: "Tokenizer",
    max_seq_length: int,
    *,
    pairs: bool = False,
    mask_prompt: bool = True,
    required: bool = True,
) -> Split | None:
    """The examples of one split (with ``pairs``: `Pair`), none longer than ``max_seq_length`` tokens.

    ``data`` is a folder with ``train``, ``valid`` (or ``dev``) and ``test`` as ``.jsonl`` or ``.json``, or one file,
    which then is the training split. None where the split is not there and not ``required``. InputError, before
    anything trains, for missing or empty data and for wrong lines, of which all are found and the first is explained.
    """
    raise NotImplementedError
