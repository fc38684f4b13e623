"""The first example of a training run as the model sees it: made of its ids, with what is trained marked."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from minicpm_data.keys import escaped

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer

BIDI = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # turn the text around that follows
# What would move a terminal's cursor, or worse: all control characters but tab and newline.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), *BIDI], "\ufffd")

MOST_CHARACTERS = 600  # of a stretch; of a longer one both ends are shown
MOST_LINES = 60  # in all; of more of them the first and the last
MOST_TOKENS = 6  # added ones that are listed
BOLD, PLAIN = "\033[1;32m", "\033[0m"

Stretch = tuple[bool, str]  # whether it is trained, and its text


def show(title: str, ids: Sequence[int], trained: Sequence[bool], tokenizer: "Tokenizer") -> None:
    """Print an example: what is trained behind "+", on a terminal in bold too; a line end as \\n. Long ones are cut in
    the middle, to at most 60 lines."""
    print(f'{title} as the model sees it ("+" is trained):')
    on_terminal = sys.stdout.isatty()
    for is_trained, line in _few([*_lines(_stretches(ids, trained, tokenizer))]):
        text = f"  {'+' if is_trained else ' '} {line}"
        print(f"{BOLD}{text}{PLAIN}" if is_trained and on_terminal else text)
    print(f"    {_counted(ids, trained, tokenizer)}")


def _stretches(ids: Sequence[int], trained: Sequence[bool], tokenizer: "Tokenizer") -> Iterator[Stretch]:
    """The text, cut where training begins and ends."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    pieces = [(bool(t), detokenizer.add(int(i))) for i, t in zip(ids, trained, strict=True)]
    if pieces:
        pieces.append((pieces[-1][0], detokenizer.finish()))
    for is_trained, group in groupby(pieces, key=lambda piece: piece[0]):
        yield is_trained, "".join(text for _, text in group)


def _lines(stretches: Iterable[Stretch]) -> Iterator[Stretch]:
    for is_trained, text in stretches:
        if len(text) > MOST_CHARACTERS:
            end = MOST_CHARACTERS // 2
            text = f"{text[:end]} ({len(text) - 2 * end:,} characters more) {text[-end:]}"
        for line in text.translate({**CONTROLS, 9: "\\t"}).replace("\n", "\\n\n").removesuffix("\n").split("\n"):
            yield is_trained, line


def _few(lines: list[Stretch]) -> list[Stretch]:
    end, left_out = MOST_LINES // 2, len(lines) - MOST_LINES
    return lines if left_out <= 0 else [*lines[:end], (False, f"({left_out:,} lines more)"), *lines[-end:]]


def _counted(ids: Sequence[int], trained: Sequence[bool], tokenizer: "Tokenizer") -> str:
    """How many tokens there are; those that were added to the vocabulary by id, as their text might be spelled out."""
    added = tokenizer.added_tokens
    found = list(dict.fromkeys(int(i) for i in ids if int(i) in added))
    listed = ", ".join(_named(found[:MOST_TOKENS], tokenizer))
    more = f" and {len(found) - MOST_TOKENS} more" if len(found) > MOST_TOKENS else ""
    counted = f"({len(ids):,} tokens, {sum(map(bool, trained)):,} trained"
    return counted + (f"; added tokens: {listed}{more})" if found else ")")


def _named(found: Iterable[int], tokenizer: "Tokenizer") -> Iterator[str]:
    for i in found:
        yield f"{escaped(tokenizer.added_tokens[i])} = {i}"
