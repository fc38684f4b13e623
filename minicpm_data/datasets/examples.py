"""Fine-tuning data: a file of any known form to token ids, and which of them are trained."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from minicpm_data.datasets.formats import Reader
from minicpm_data.datasets.jsonl import read_items
from minicpm_data.datasets.preview import show
from minicpm_data.datasets.turns import Turn, messages_of
from minicpm_data.keys import KeyRules, few
from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer

IGNORED = -100  # a label that is not trained, as in PyTorch

# Number of batch rows -> the indices of those that this process makes, in order. The other processes make the rest.
LocalRows = Callable[[int], Sequence[int]]

SplitName = Literal["train", "valid", "test"]
STEMS = {"train": ("train",), "valid": ("valid", "dev"), "test": ("test",)}  # OpenBMB's data has train and dev
SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class Example:
    """A conversation or a text. BOS comes first where the tokenizer adds it; the first token is never trained, as
    nothing predicts it."""

    ids: np.ndarray  # [T] int32
    trained: np.ndarray  # [T] bool: which tokens are targets
    empty: bool = False  # an answer without text is among what is trained
    unanswered: bool = False  # it had messages after its last answer, which are left out

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
    unused: tuple[str, ...] = ()  # keys that were passed over

    def summary(self) -> str:
        """One line for the user: how many examples and tokens, and what the window cost."""
        parts = [part for item in self.examples for part in item.parts]
        tokens, trained = sum(part.length for part in parts), sum(int(part.trained.sum()) for part in parts)
        kind = ("pair" if isinstance(self.examples[0], Pair) else "example") + "s" * (len(self.examples) != 1)
        line = f"{self.path.name}: {len(self.examples):,} {kind}, {tokens:,} tokens, {trained:,} of them trained"
        line += f"; {self.cut:,} cut at the window's end" if self.cut else ""
        line += f"; {self.dropped:,} dropped, nothing trained in the window" if self.dropped else ""
        empty, unanswered = sum(part.empty for part in parts), sum(part.unanswered for part in parts)
        line += f"; {empty:,} with an empty answer, whose end alone is trained" if empty else ""
        line += f"; {unanswered:,} with messages after the last answer, which are left out" if unanswered else ""
        return line + (f"; not read: {few(self.unused, '')}" if self.unused else "")


def load_split(
    data: Path,
    split: SplitName,
    tokenizer: "Tokenizer",
    max_seq_length: int,
    *,
    pairs: bool = False,
    mask_prompt: bool = True,
    required: bool = True,
    ignore_keys: Collection[str] = (),
    trusted: bool = True,
) -> Split | None:
    """The examples of one split (with ``pairs``: `Pair`), none longer than ``max_seq_length`` tokens.

    ``data`` is a folder with ``train``, ``valid`` (or ``dev``) and ``test`` as ``.jsonl`` or ``.json``, or one file,
    which then is the training split. None where the split is not there and not ``required``. InputError, before
    anything trains, for missing or empty data and for wrong lines, of which all are found and the first is explained:
    a key that is not understood makes one, unless it is one of ``ignore_keys``. ``trusted``: tokens of the vocabulary
    that the data spells out become their ids.
    """
    path = find_split(data, split, required)
    if path is None:
        return None
    make = make_pair if pairs else make_example
    rules = KeyRules(ignore_keys)
    items = read_items(path, lambda document: make(document, tokenizer, mask_prompt, Reader(rules), trusted))
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
    return Split(path, kept, dropped, beyond - dropped, tuple(rules.unused))


def show_first(split: Split, tokenizer: "Tokenizer") -> None:
    """Print the first example, or both answers of the first pair."""
    first = split.examples[0]
    names = ("example",) if len(first.parts) == 1 else ("chosen answer", "rejected answer")
    for name, part in zip(names, first.parts, strict=True):
        show(f"the first {name} of {split.path.name}", part.ids, part.trained, tokenizer)


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


def make_example(
    document: dict[str, Any],
    tokenizer: "Tokenizer",
    mask_prompt: bool = True,
    reader: Reader | None = None,
    trusted: bool = True,
) -> Example:
    """A text is trained from its second token to its EOS, a conversation in its answers; without ``mask_prompt`` it is
    trained as a text is. What the data says not to train is not. ``trusted``: tokens of the vocabulary that it spells
    out become their ids."""
    turns = (reader or Reader()).conversation(document)
    if isinstance(turns, str):
        if not turns:
            raise InputError("its text is empty; delete it.")
        ids = ended(tokenizer.encode(turns, trusted=trusted), tokenizer)
        return _example(ids, [True] * len(ids))
    if not mask_prompt and any(turn.weight is False and turn.role != "assistant" for turn in turns):
        raise InputError(
            "it has a message of no assistant that is not to be trained, and --train-on-prompt trains them all; leave "
            "one of them out."
        )
    trained = [turn.trained(mask_prompt) for turn in turns]
    answers = [flag for flag, turn in zip(trained, turns, strict=True) if turn.role == "assistant"]
    if answers and not any(answers) and mask_prompt:
        raise InputError("it has no answer that is to be trained; delete it, or the weights of its messages.")
    example = _example(*tokenizer.chat_example(messages_of(turns), trained, not mask_prompt, trusted))
    return replace(example, empty=_is_empty(turns, trained), unanswered=turns[-1].role != "assistant")


def make_pair(
    document: dict[str, Any],
    tokenizer: "Tokenizer",
    mask_prompt: bool = True,
    reader: Reader | None = None,
    trusted: bool = True,
) -> Pair:
    """Of both conversations the last answer is trained, whatever ``mask_prompt`` is."""
    chosen, rejected = (
        replace(
            _example(*tokenizer.chat_example(messages_of(turns), _only_last(turns), trusted=trusted)),
            empty=_is_empty(turns, _only_last(turns)),
        )
        for turns in (reader or Reader()).pair(document)
    )
    return Pair(chosen, rejected)


def _is_empty(turns: Sequence[Turn], trained: Sequence[bool]) -> bool:
    return any(
        t and turn.role == "assistant" and not turn.content.strip() for turn, t in zip(turns, trained, strict=True)
    )


def _only_last(turns: Sequence[Turn]) -> list[bool]:
    return [False] * (len(turns) - 1) + [True]


def _example(ids: list[int], trained: list[bool]) -> Example:
    return Example(np.array(ids, np.int32), np.array([False, *trained[1:]]))


def _within(item: Example | Pair, width: int) -> Example | Pair:
    parts = [replace(part, ids=part.ids[:width], trained=part.trained[:width]) for part in item.parts]
    return Pair(*parts) if isinstance(item, Pair) else parts[0]


def ended(ids: list[int], tokenizer: "Tokenizer") -> list[int]:
    """``ids`` with EOS at their end, once."""
    if not tokenizer.eos_token_ids:
        raise InputError("the tokenizer has no EOS token to end a text with; give it one in tokenizer_config.json.")
    return ids if ids and ids[-1] in tokenizer.eos_token_ids else [*ids, tokenizer.eos_token_ids[0]]
