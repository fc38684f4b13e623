"""Every JSON text of a model, an adapter or a run: read strictly, in bounded time and memory.

What Python's reader lets pass and a stricter one would not is refused: a key twice (the last one would win in silence),
half a character. A byte order mark, which editors on Windows write, is passed over. NaN and Infinity are read as
Python and transformers read them: whoever wants a number refuses them under the name of their key.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from weights_io.errors import InputError, short
from weights_io.files.regular import read_regular

MAX_BYTES = 2**26  # the largest tokenizer.json of a released model has half of that
MAX_CONFIG = 2**24  # bytes of any other file; an index of 90,000 tensors has half of that
BYTES_OF_PART = 16  # of those that a text may have, for each comma and bracket: a vocabulary of 256k makes 2 million
SMALL = 2**20  # bytes of a text whose parts are not counted
MAX_DEPTH = 100  # lists and objects in each other; a tokenizer.json has 8
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # may be half of a character, which has two of them


class KeyTwice(ValueError):
    """An object has a ``key`` twice, of which the last one would win in silence."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def parse(text: str) -> Any:
    """The value of a JSON text, without bounds. Raises `KeyTwice`, and what `json.loads` does."""
    return json.loads(text, object_pairs_hook=_object)


def loads(text: str | bytes, what: str, most: int = MAX_BYTES, remedy: str = "download it again") -> Any:
    """The value of a JSON text of at most ``most`` bytes.

    Raises `InputError`, naming ``what`` and the ``remedy``, where it is none, too large, too deep or ambiguous.
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
    """The same for a text that must be a JSON object."""
    value = loads(text, what, most)
    if not isinstance(value, dict):
        raise InputError(f"{what} holds {type(value).__name__}, not a JSON object; download it again.")
    return value


def read_json(path: Path, most: int = MAX_CONFIG) -> dict[str, Any]:
    """The JSON object in a file. `InputError` where there is none; see `loads` and `open_regular`."""
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist; a model folder holds config.json beside its weights.")
    return parse_object(read_regular(path, most), str(path), most)


def read_optional_json(path: Path, most: int = MAX_CONFIG) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no such file."""
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
