"""JSON that a stranger wrote: read whole, or refused in one sentence."""

import json
from typing import Any

from weights_io.errors import InputError, short


def loads(text: str | bytes, what: str) -> Any:
    """The value that a JSON text holds. A UTF-8 byte order mark at its head is passed over.

    Arguments:
        text: the text, or its UTF-8 bytes.
        what: names the text in an error: a file, or a part of a request.

    Raises:
        InputError: the text is not UTF-8, not JSON, nested too deeply, or has an object with two values of one key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise InputError(f"{what} has the key {_twice(pairs)!r} twice; keep the one that is meant.")
        return found

    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        return json.loads(decoded, object_pairs_hook=unique)
    except InputError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number of 5,000 digits
        raise InputError(f"{what} is not JSON ({error}); download it again.") from None


def _twice(pairs: list[tuple[str, Any]]) -> str:
    """The first key that comes twice, as a message quotes it."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return short(key)
        seen.add(key)
    raise ValueError("no key comes twice")
