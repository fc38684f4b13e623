"""Fine-tuning data: a file of any known form to token ids, and which of them are trained."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from minicpm_data import forms
from minicpm_data.documents import is_array, scan_array, scan_lines
from minicpm_data.packing import ended
from weights_io.errors import InputError
from weights_io.progress import progress_bar

if TYPE_CHECKING:
    from minicpm_data.tokenizer import Tokenizer

SplitName = Literal["train", "valid", "test"]
STEMS = {"train": ("train",), "valid": ("valid", "dev"), "test": ("test",)}  # OpenBMB's data has train and dev
SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class Example:
    """A conversation or a text. BOS comes first where the tokenizer adds it; the first token is never trained, as
    nothing predicts it."""

    ids: np.ndarray  # [T] int32
    trained: np.ndarray  # [T] bool: which tokens are targets

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def parts(self) -> tuple["Example", ...]:
        return (self,)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; the answer and its EOS are ``trained``."""

    chosen: Example
    rejected: Example

    @property
    def length(self) -> int:
        """Of the longer one."""
        return max(self.chosen.length, self.rejected.length)

    @property
    def parts(self) -> tuple[Example, ...]:
        return self.chosen, self.rejected


@dataclass(frozen=True)
class Split:
    """The examples of one file."""

    path: Path
    examples: list[Any]  # of Example, or of Pair
    dropped: int  # examples of whose trained tokens none lies within the window
    cut: int  # examples cut at the window's end

    def summary(self) -> str:
        """One line for the user: how many examples and tokens, and what the window cost."""
        parts = [part for item in self.examples for part in item.parts]
        tokens, trained = sum(part.length for part in parts), sum(int(part.trained.sum()) for part in parts)
        kind = "pairs" if isinstance(self.examples[0], Pair) else "examples"
        line = f"{self.path.name}: {len(self.examples):,} {kind}, {tokens:,} tokens, {trained:,} of them trained"
        line += f"; {self.cut:,} cut at the window's end" if self.cut else ""
        return line + (f"; {self.dropped:,} dropped, nothing trained in the window" if self.dropped else "")


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
    path = find_split(data, split, required)
    if path is None:
        return None
    make = make_pair if pairs else make_example
    items = read_items(path, lambda document: make(document, tokenizer, mask_prompt))
    lengths = [item.length for item in items]
    within = [_within(item, max_seq_length) for item in items]
    kept = [item for item in within if any(part.trained.any() for part in item.parts)]
    if not kept:
        raise InputError(
            f"no example of {path} has anything to train in its first {max_seq_length} tokens; --max-seq-length "
            f"{min(lengths)} would hold the shortest of them, {max(lengths)} all."
        )
    beyond = sum(length > max_seq_length for length in lengths)
    dropped = len(items) - len(kept)
    return Split(path, kept, dropped, beyond - dropped)


def find_split(data: Path, split: SplitName, required: bool = True) -> Path | None:
    """The file of a split, as `load_split` looks for it."""
    if data.is_file() and split == "train":
        return data
    names = [f"{stem}{suffix}" for stem in STEMS[split] for suffix in SUFFIXES]
    found = [data / name for name in names if (data / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{data} holds both {found[0].name} and {found[1].name}; keep one of them.")
    if found or not required:
        return found[0] if found else None
    looked = " or ".join([", ".join(names[:-1]), names[-1]])
    if data.is_file():
        raise InputError(f"{data} is one file, which is for training; give a folder that holds {looked} too.")
    raise InputError(f"{data} {'holds no' if data.is_dir() else 'does not exist; it should hold'} {looked}.")


def read_items(path: Path, make: Callable[[dict], Any]) -> list[Any]:
    """``make`` of each document of a file. InputError where the file is empty or ``make`` raises one: the first is told
    and the others are counted."""
    array = path.suffix == ".json" and is_array(path)
    unit = "item" if array else "line"
    items, wrong, why = [], [], ""
    with progress_bar(f"tokenising {path.name}", path.stat().st_size) as bar:
        for number, document in (scan_array if array else scan_lines)(path, bar.update):
            try:
                if isinstance(document, InputError):
                    raise document
                items.append(make(document))
            except InputError as error:
                why = why or f"{' ' if error is document else ': '}{error}"
                wrong.append(number)
    if wrong:
        others = ", ".join(map(str, wrong[1:11])) + (", ..." if len(wrong) > 11 else "")
        more = f" ({len(wrong) - 1} more {unit}s are wrong: {others})" if wrong[1:] else ""
        raise InputError(f"{path}, {unit} {wrong[0]}{why.removesuffix('.')}{more}.")
    if not items:
        raise InputError(f"{path} is empty; give it one example a line.")
    return items


def make_example(document: dict[str, Any], tokenizer: "Tokenizer", mask_prompt: bool = True) -> Example:
    """A text is trained from its second token to its EOS, a conversation in its answers; without ``mask_prompt`` it is
    trained as a text is."""
    turns = forms.conversation(document)
    if isinstance(turns, str):
        if not turns:
            raise InputError("its text is empty; delete it.")
        ids = ended(tokenizer.encode(turns), tokenizer)
        return _example(ids, [True] * len(ids))
    ids, trained = tokenizer.chat_example(turns)
    return _example(ids, trained if mask_prompt else [True] * len(ids))


def make_pair(document: dict[str, Any], tokenizer: "Tokenizer", mask_prompt: bool = True) -> Pair:
    """Of both conversations the last answer is trained, whatever ``mask_prompt`` is."""
    chosen, rejected = (_example(*tokenizer.chat_example(m, only_last=True)) for m in forms.pair(document))
    return Pair(chosen, rejected)


def _example(ids: list[int], trained: list[bool]) -> Example:
    return Example(np.array(ids, np.int32), np.array([False, *trained[1:]]))


def _within(item: Example | Pair, width: int) -> Example | Pair:
    parts = [Example(part.ids[:width], part.trained[:width]) for part in item.parts]
    return Pair(*parts) if isinstance(item, Pair) else parts[0]
