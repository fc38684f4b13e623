"""Parse the JSON files of models, adapters and runs strictly, in bounded time and memory.

Duplicate keys (Python would silently keep the last one) and lone surrogates are refused. A byte order mark, which
editors on Windows write, is skipped. NaN and Infinity are accepted as in Python and transformers; the reader of a
number refuses them under the name of its key.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from weights_io.errors import InputError, short
from weights_io.files.regular import read_regular

MAX_BYTES = 2**26  # twice the largest tokenizer.json of a released model
MAX_CONFIG = 2**24  # bytes of any other file; twice an index of 90,000 tensors
BYTES_OF_PART = 16  # a text may have one comma or bracket per 16 bytes of its limit; a vocabulary of 256k has 2 million
SMALL = 2**20  # bytes; in smaller texts commas and brackets are not counted
MAX_DEPTH = 100  # nested lists and objects; a tokenizer.json has 8
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # a surrogate, which may be alone


class KeyTwice(ValueError):
    """An object has the same ``key`` twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def parse(text: str) -> Any:
    """Parse a JSON text of any size. Raises `KeyTwice`, and the exceptions of `json.loads`."""
    return json.loads(text, object_pairs_hook=_object)


def loads(text: str | bytes, what: str, most: int = MAX_BYTES, remedy: str = "download it again") -> Any:
    """Parse a JSON text.

    Arguments:
        text: the text.
        what: the subject of messages.
        most: most bytes of the text.
        remedy: what the user can do.

    Raises:
        InputError: the text is not JSON, too large or too deep, or has a duplicate key or a lone surrogate.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    parts = sum(data.count(part) for part in (b",", b"[", b"{")) if len(data) > SMALL else 0
    if len(data) > most or parts > most // BYTES_OF_PART:
        raise InputError(f"{what} is larger than any such JSON text is ({len(data)} bytes); {remedy}.")
    try:
        value = parse(data.decode("utf-8-sig"))
        if HALF.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except KeyTwice as error:
        raise InputError(f"{what} has the key {short(error.key)!r} twice; keep the one that is meant.") from None
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number of 5000 digits
        raise InputError(f"{what} is not JSON ({error}); {remedy}.") from None
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_deep(value):
        raise InputError(f"{what} has more than {MAX_DEPTH} lists and objects in each other; {remedy}.")
    return value


def parse_object(text: str | bytes, what: str, most: int = MAX_BYTES) -> dict[str, Any]:
    """`loads` for a text that must be a JSON object."""
    value = loads(text, what, most)
    if not isinstance(value, dict):
        raise InputError(f"{what} holds {type(value).__name__}, not a JSON object; download it again.")
    return value


def read_json(path: Path, most: int = MAX_CONFIG) -> dict[str, Any]:
    """The JSON object in a file. Raises `InputError` where it is missing, and as `loads` and `open_regular` do."""
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist; a model folder holds config.json beside its weights.")
    return parse_object(read_regular(path, most), str(path), most)


def read_optional_json(path: Path, most: int = MAX_CONFIG) -> dict[str, Any]:
    """`read_json`, with {} for a missing file."""
    return read_json(path, most) if os.path.lexists(path) else {}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        raise KeyTwice(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return result


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = (part for each in level for part in (each.values() if isinstance(each, dict) else each))
        level = [part for part in inner if isinstance(part, dict | list)]
        if not level:
            return False
    return True
