"""Fine-tuning data: files in any known format to token ids, with a mask of the trained tokens."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from minicpm_data.datasets.formats import Reader
from minicpm_data.datasets.images import ImageData, StoredImage
from minicpm_data.datasets.jsonl import read_items
from minicpm_data.datasets.preview import show
from minicpm_data.datasets.turns import Conversation, Turn, messages_of
from minicpm_data.images.conversation import IMAGE, encode_example
from minicpm_data.keys import KeyRules, few
from weights_io.errors import InputError
from weights_io.vision.config import VisionConfig

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
    """A conversation or a text. It starts with BOS where the tokenizer adds it. The first token is never a target."""

    ids: np.ndarray  # [T] int32; `IMAGE` at the tokens of images
    trained: np.ndarray  # [T] bool: which tokens are targets
    empty: bool = False  # one of the trained answers has no text
    unanswered: bool = False  # messages after its last answer were left out
    images: tuple[StoredImage, ...] = ()  # in the order of their tokens

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def parts(self) -> tuple["Example", ...]:
        return (self,)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. The targets are the answer and its EOS."""

    chosen: Example
    rejected: Example

    @property
    def length(self) -> int:
        """Length of the longer one in tokens."""
        return max(self.chosen.length, self.rejected.length)

    @property
    def parts(self) -> tuple[Example, ...]:
        return self.chosen, self.rejected


@dataclass(frozen=True)
class Split:
    """The examples of one file."""

    path: Path
    examples: list[Any]  # `Example` or `Pair`
    dropped: int  # examples without a target within the window
    cut: int  # examples truncated to the window
    unused: tuple[str, ...] = ()  # keys of the data that were ignored

    def summary(self) -> str:
        """One line for the user: the number of examples and tokens, and what the window cut off."""
        parts = [part for item in self.examples for part in item.parts]
        tokens, trained = sum(part.length for part in parts), sum(int(part.trained.sum()) for part in parts)
        images = sum(len(part.images) for part in parts)
        kind = ("pair" if isinstance(self.examples[0], Pair) else "example") + "s" * (len(self.examples) != 1)
        line = f"{self.path.name}: {len(self.examples):,} {kind}, {tokens:,} tokens, {trained:,} of them trained"
        line += f"; {images:,} image{'s' * (images != 1)}" if images else ""
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
    vision: VisionConfig | None = None,
    max_slices: int | None = None,
) -> Split | None:
    """Load the examples of one split.

    Arguments:
        data: a folder with ``train``, ``valid`` (or ``dev``) and ``test`` as ``.jsonl`` or ``.json``; or one file,
            which is the training split.
        split: the split to load.
        tokenizer: the model's.
        max_seq_length: examples are truncated to this many tokens.
        pairs: read preference pairs.
        mask_prompt: train only the answers.
        required: whether a missing split is an error.
        ignore_keys: keys of the data to ignore.
        trusted: special tokens that the data spells out become their ids.
        vision: of a model that sees; None refuses images.
        max_slices: most slices of an image; None: the model's own number.

    Returns:
        The split; None where it is missing and not ``required``.

    Raises:
        InputError: the data is missing or empty, no example has a target within the window, or lines are wrong. All
            lines are read; the first wrong one is explained and the others are counted. An unknown key makes a line
            wrong unless it is in ``ignore_keys``.
    """
    path = find_split(data, split, required)
    if path is None:
        return None
    make = make_pair if pairs else make_example
    rules = KeyRules(ignore_keys)
    reader = Reader(rules, None if vision is None else ImageData(vision, path.parent, max_slices))
    items = read_items(path, lambda document: make(document, tokenizer, mask_prompt, reader, trusted))
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
    """Print the first example as the model sees it, or both answers of the first pair."""
    first = split.examples[0]
    names = ("example",) if len(first.parts) == 1 else ("chosen answer", "rejected answer")
    for name, part in zip(names, first.parts, strict=True):
        show(f"the first {name} of {split.path.name}", part.ids, part.trained, tokenizer)


def find_split(data: Path, split: SplitName, required: bool = True) -> Path | None:
    """The file of a split; arguments and errors as for `load_split`."""
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
    """Tokenize one document.

    Arguments:
        document: a line of the data.
        tokenizer: the model's.
        mask_prompt: train only the answers of a conversation, except those that the data excludes. Otherwise all of it
            is trained, like a text.
        reader: reads the document's format.
        trusted: special tokens that the document spells out become their ids.

    Raises:
        InputError: the document cannot be used.
    """
    reader = reader or Reader()
    found = reader.conversation(document)
    if isinstance(found, str):
        if not found:
            raise InputError("its text is empty; delete it.")
        ids = ended(tokenizer.encode(found, trusted=trusted), tokenizer)
        return _example(ids, [True] * len(ids))
    turns = found.turns
    if not mask_prompt and any(turn.weight is False and turn.role != "assistant" for turn in turns):
        raise InputError(
            "it has a user or system message with weight 0, and --train-on-prompt trains all messages; leave out one "
            "of the two."
        )
    trained = [turn.trained(mask_prompt) for turn in turns]
    answers = [flag for flag, turn in zip(trained, turns, strict=True) if turn.role == "assistant"]
    if answers and not any(answers) and mask_prompt:
        raise InputError("it has no answer to train; delete it, or the weights of its messages.")
    example = _encoded(found, tokenizer, reader, trained, not mask_prompt, trusted)
    return replace(example, empty=_is_empty(turns, trained), unanswered=turns[-1].role != "assistant")


def make_pair(
    document: dict[str, Any],
    tokenizer: "Tokenizer",
    mask_prompt: bool = True,
    reader: Reader | None = None,
    trusted: bool = True,
) -> Pair:
    """Tokenize a preference pair. Only the last answer of each conversation is trained, whatever ``mask_prompt`` is."""
    reader = reader or Reader()
    chosen, rejected = (
        replace(
            _encoded(found, tokenizer, reader, _only_last(found.turns), False, trusted),
            empty=_is_empty(found.turns, _only_last(found.turns)),
        )
        for found in reader.pair(document)
    )
    return Pair(chosen, rejected)


def _encoded(
    found: Conversation, tokenizer: "Tokenizer", reader: Reader, trained: list[bool], prompts: bool, trusted: bool
) -> Example:
    """A conversation as an example. Arguments as for `Tokenizer.chat_example`."""
    if reader.images is None:
        messages = messages_of(found.turns)
        return _example(*tokenizer.chat_example(messages, trained, prompts, trusted, found.tools))
    messages, sources = reader.images.messages(found.turns, found.images)
    vision, most = reader.images.vision, reader.images.max_slices
    chat, targets = encode_example(tokenizer, vision, messages, trained, prompts, trusted, found.tools, most)
    stored = map(reader.images.stored, sources, chat.images)
    return replace(_example(chat.ids, targets), images=tuple(stored))


def _is_empty(turns: Sequence[Turn], trained: Sequence[bool]) -> bool:
    return any(t and turn.role == "assistant" and turn.says_nothing for turn, t in zip(turns, trained, strict=True))


def _only_last(turns: Sequence[Turn]) -> list[bool]:
    return [False] * (len(turns) - 1) + [True]


def _example(ids: list[int], trained: list[bool]) -> Example:
    return Example(np.array(ids, np.int32), np.array([False, *trained[1:]]))


def _within(item: Example | Pair, width: int) -> Example | Pair:
    parts = [_cut(part, width) for part in item.parts]
    return Pair(*parts) if isinstance(item, Pair) else parts[0]


def _cut(part: Example, width: int) -> Example:
    """The first ``width`` tokens of an example, or fewer: an image that does not fit is left out whole."""
    images = part.images
    if images and part.length > width:
        at = np.flatnonzero(part.ids == IMAGE)
        ends = np.cumsum([image.tokens for image in images])
        fitting = int(np.searchsorted(at[ends - 1], width))
        if fitting < len(images):
            width = min(width, int(at[ends[fitting] - images[fitting].tokens]) - 1)
        images = images[:fitting]
    return replace(part, ids=part.ids[:width], trained=part.trained[:width], images=images)


def ended(ids: list[int], tokenizer: "Tokenizer") -> list[int]:
    """``ids`` with one EOS at the end."""
    if not tokenizer.eos_token_ids:
        raise InputError("the tokenizer has no EOS token to end a text with; give it one in tokenizer_config.json.")
    return ids if ids and ids[-1] in tokenizer.eos_token_ids else [*ids, tokenizer.eos_token_ids[0]]
