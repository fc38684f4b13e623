"""Read files of JSON objects: one per line, or one array."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from minicpm_data.keys import as_json
from weights_io.errors import MOST_NAMES, InputError, not_utf8
from weights_io.files.json_text import KeyTwice, parse
from weights_io.progress import progress_bar

BOM = "\ufeff".encode()
LONGEST_LINE = 2**26  # bytes; ten times the longest book
LONGEST_ARRAY = 2**30  # bytes of an array, which is read at once


def read_items(path: Path, make: Callable[[dict], Any]) -> list[Any]:
    """Call ``make`` with each document of a file.

    Raises:
        InputError: the file is missing or empty, or documents are wrong: the first error is told, the others counted.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist, or is no file; it should hold one JSON object a line.")
    array = is_array(path)
    unit = "item" if array else "line"
    items, wrong, why, is_json = [], [], "", False
    with progress_bar(f"tokenizing {path.name}", path.stat().st_size) as bar:
        for number, document in (scan_array if array else scan_lines)(path, bar.update):
            try:
                if isinstance(document, InputError):
                    raise document
                is_json = True
                items.append(make(document))
            except (InputError, RecursionError) as error:
                if isinstance(error, RecursionError):
                    error = InputError("it is nested too deeply; correct or delete it.")
                why = why or (f"{error}" if error is document else f"{unit} {number}: {error}")
                wrong.append(number)
    if wrong and not is_json and path.suffix not in (".jsonl", ".json"):
        raise InputError(f"{path} holds no JSON; convert it to a .jsonl file, with one JSON object a line.")
    if wrong:
        others = ", ".join(map(str, wrong[1 : MOST_NAMES + 1])) + (", ..." if len(wrong) > MOST_NAMES + 1 else "")
        are = f"{unit}s are" if wrong[2:] else f"{unit} is"
        more = f" ({len(wrong) - 1} more {are} wrong: {others})" if wrong[1:] else ""
        raise InputError(f"{path}, {why.removesuffix('.')}{more}.")
    if not items:
        raise InputError(f"{path} is empty; give it one example a line.")
    return items


def read_documents(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of a ``.jsonl`` file. Raises `InputError` at a wrong line."""
    for number, document in scan_lines(path):
        if isinstance(document, InputError):
            raise InputError(f"{path}, {document}")
        yield number, document


def scan_lines(
    path: Path, on_read: Callable[[int], Any] = lambda nbytes: None
) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Line number and object of each line that is not blank; an `InputError` in place of the object of a wrong line.

    ``on_read`` is called with the bytes of each line.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; it should hold one JSON object a line.")
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
            on_read(len(line))
            if len(line) > LONGEST_LINE:
                yield number, InputError(f"line {number} is longer than {LONGEST_LINE} bytes; split it.")
                return
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield number, _parsed(line, f"line {number}")


def scan_array(
    path: Path, on_read: Callable[[int], Any] = lambda nbytes: None
) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """`scan_lines` for the items of a JSON array. The first is item 1."""
    if (size := path.stat().st_size) > LONGEST_ARRAY:
        raise InputError(
            f"{path} is one array of {size} bytes, above the limit of {LONGEST_ARRAY}; write one object per line into "
            "a .jsonl file."
        )
    content = path.read_bytes()
    items = _json(content.removeprefix(BOM), str(path))
    for number, item in enumerate(items, 1):
        on_read(len(content) // len(items))
        yield number, _object(item, f"item {number}")


def is_array(path: Path) -> bool:
    """Whether a file holds one array. A file with one array per line does not count."""
    with path.open("rb") as file:
        pieces = (piece.removeprefix(BOM).strip() for piece in iter(partial(file.readline, LONGEST_LINE), b""))
        filled = filter(None, pieces)
        first = next(filled, b"")
        return first.startswith(b"[") and not (first.endswith(b"]") and any(filled))


def _parsed(line: bytes, what: str) -> dict[str, Any] | InputError:
    try:
        return _object(_json(line, what), what)
    except InputError as error:
        return error


def _json(text: bytes, what: str) -> Any:
    """The value of a JSON text of any size. Raises `InputError`."""
    if not (encoding := json.detect_encoding(text)).startswith("utf-8"):
        raise InputError(f"{what} is {encoding[:6].upper()} text; convert the file to UTF-8 first.")
    try:
        return parse(text.decode("utf-8"))
    except KeyTwice as error:
        raise InputError(f"{what} has the key {as_json(error.key)} twice; keep one of them.") from None
    except UnicodeDecodeError as error:
        raise not_utf8(what, error, "convert the file to UTF-8 first") from None
    except RecursionError:
        raise InputError(f"{what} is not JSON (it is nested too deeply); correct or delete it.") from None
    except json.JSONDecodeError as error:
        if error.doc[error.pos :].strip() or not error.pos:
            raise InputError(f"{what} is not JSON ({error.msg}); correct or delete it.") from None
        raise InputError(
            f"{what} ends before its JSON does; put one whole object on each line, or all into one array."
        ) from None
    except ValueError as error:  # a number of 4300 digits
        raise InputError(f"{what} is not JSON ({str(error).partition(';')[0]}); correct or delete it.") from None


def _object(value: Any, what: str) -> dict[str, Any] | InputError:
    return value if isinstance(value, dict) else InputError(f'{what} is not an object such as {{"text": "..."}}.')
