"""Print the first example of a training run as the model sees it: decoded from its ids, with trained tokens marked."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from minicpm_data.keys import escaped

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer

BIDI = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # change the direction of the text after them
# Characters that could move a terminal's cursor, or worse: all control characters except tab and newline.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), *BIDI], "\ufffd")

MOST_CHARACTERS = 600  # of a stretch; only the two ends of a longer one are shown
MOST_LINES = 60  # in total; of more lines only the first and the last are shown
MOST_TOKENS = 6  # added tokens that are listed
BOLD, PLAIN = "\033[1;32m", "\033[0m"

Stretch = tuple[bool, str]  # whether it is trained, and its text


def show(title: str, ids: Sequence[int], trained: Sequence[bool], tokenizer: "Tokenizer") -> None:
    """Print an example. Trained lines are marked with "+", and are bold on a terminal. The end of a line is shown as
    \\n. Long examples are cut in the middle, to at most 60 lines.

    Arguments:
        title: the name of the example.
        ids: token ids, negative where they are tokens of an image.
        trained: for each id, whether it is trained.
        tokenizer: decodes the ids.
    """
    print(f'{title} as the model sees it ("+" is trained):')
    on_terminal = sys.stdout.isatty()
    for is_trained, line in _few([*_lines(_stretches(ids, trained, tokenizer))]):
        text = f"  {'+' if is_trained else ' '} {line}"
        print(f"{BOLD}{text}{PLAIN}" if is_trained and on_terminal else text)
    print(f"    {_counted(ids, trained, tokenizer)}")


def _stretches(ids: Sequence[int], trained: Sequence[bool], tokenizer: "Tokenizer") -> Iterator[Stretch]:
    """Yields the text, split where trained tokens start and end."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    pieces: list[Stretch] = []
    for i, t in zip(*_without_images(ids, trained), strict=True):
        pieces.append((bool(t), i if isinstance(i, str) else detokenizer.add(i)))
    if pieces:
        pieces.append((pieces[-1][0], detokenizer.finish()))
    for is_trained, group in groupby(pieces, key=lambda piece: piece[0]):
        yield is_trained, "".join(text for _, text in group)


def _without_images(ids: Sequence[int], trained: Sequence[bool]) -> tuple[list[int | str], list[bool]]:
    """The ids with a text in place of the tokens of each part of an image, which have none."""
    found: list[int | str] = []
    flags: list[bool] = []
    for (of_image, flag), run in groupby(zip(ids, trained, strict=True), lambda pair: (pair[0] < 0, bool(pair[1]))):
        tokens: list[int | str] = [int(i) for i, _ in run]
        found += [f"({len(tokens)} tokens of an image)"] if of_image else tokens
        flags += [flag] if of_image else [flag] * len(tokens)
    return found, flags


def _lines(stretches: Iterable[Stretch]) -> Iterator[Stretch]:
    """Yields the lines of the stretches. Long stretches are cut, and control characters are replaced."""
    for is_trained, text in stretches:
        if len(text) > MOST_CHARACTERS:
            end = MOST_CHARACTERS // 2
            text = f"{text[:end]} ({len(text) - 2 * end:,} characters more) {text[-end:]}"
        for line in text.translate({**CONTROLS, 9: "\\t"}).replace("\n", "\\n\n").removesuffix("\n").split("\n"):
            yield is_trained, line


def _few(lines: list[Stretch]) -> list[Stretch]:
    """All lines up to `MOST_LINES`; of more lines the first and the last, and the number of those between."""
    end, left_out = MOST_LINES // 2, len(lines) - MOST_LINES
    return lines if left_out <= 0 else [*lines[:end], (False, f"({left_out:,} lines more)"), *lines[-end:]]


def _counted(ids: Sequence[int], trained: Sequence[bool], tokenizer: "Tokenizer") -> str:
    """The number of tokens, and the added tokens with their ids, since their text could also be spelled out."""
    added = tokenizer.added_tokens
    found = list(dict.fromkeys(int(i) for i in ids if int(i) in added))
    listed = ", ".join(_named(found[:MOST_TOKENS], tokenizer))
    more = f" and {len(found) - MOST_TOKENS} more" if len(found) > MOST_TOKENS else ""
    counted = f"({len(ids):,} tokens, {sum(map(bool, trained)):,} trained"
    return counted + (f"; added tokens: {listed}{more})" if found else ")")


def _named(found: Iterable[int], tokenizer: "Tokenizer") -> Iterator[str]:
    """Yields ``text = id`` for each added token."""
    for i in found:
        yield f"{escaped(tokenizer.added_tokens[i])} = {i}"
