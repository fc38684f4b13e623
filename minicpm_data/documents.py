"""Files of JSON objects: one a line, or in one array."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from weights_io.errors import InputError

BOM = "\ufeff".encode()


def read_documents(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of a ``.jsonl`` file; a wrong line is an `InputError` that names it."""
    for number, document in scan_lines(path):
        if isinstance(document, InputError):
            raise InputError(f"{path}, line {number} {document}")
        yield number, document


def scan_lines(
    path: Path, on_read: Callable[[int], Any] = lambda nbytes: None
) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Line number and object of each line that is not blank; for a wrong one the error, whose text goes on from the
    name of the line. ``on_read`` is told the bytes of each."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; it should hold one JSON object a line.")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            on_read(len(line))
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield number, _parsed(line)


def scan_array(
    path: Path, on_read: Callable[[int], Any] = lambda nbytes: None
) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """The same for the items of a JSON array, the first of which is number 1."""
    content = path.read_bytes().removeprefix(BOM)
    try:
        items = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON array ({error}); mend it.") from None
    for number, item in enumerate(items, 1):
        on_read(len(content) // len(items))
        yield number, item if isinstance(item, dict) else _no_object()


def is_array(path: Path) -> bool:
    """Whether a ``.json`` file holds one array; else it is read line by line."""
    with path.open("rb") as file:
        lines = (line.removeprefix(BOM).lstrip() for line in file)
        return next(filter(None, lines), b"").startswith(b"[")


def _parsed(line: bytes) -> dict[str, Any] | InputError:
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return InputError(f"is not UTF-8 text (byte {error.start}); convert the file first.")
    except (ValueError, RecursionError) as error:  # ValueError: besides wrong JSON, numbers of 4300 digits
        return InputError(f"is not JSON ({getattr(error, 'msg', error)}); mend or delete the line.")
    return document if isinstance(document, dict) else _no_object()


def _no_object() -> InputError:
    return InputError('is not an object such as {"text": "..."}.')
