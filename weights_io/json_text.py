"""JSON of files that somebody else wrote: read whole and as one thing, or refused in a sentence."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from weights_io.errors import InputError

BOM = "\ufeff"


def loads(text: str | bytes, what: str) -> Any:
    """The value of a JSON text, which may begin with a byte order mark. NaN and Infinity are read as Python reads them.

    Raises `InputError`, a sentence that begins with ``what``: for bytes that are not UTF-8, for text that is not JSON
    or is nested too deeply, and for an object that has a key twice, of which `json` would keep the last in silence.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{what} is not UTF-8 text (byte {error.start}); convert it first.") from None

    def pairs(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            counts = Counter(key for key, _ in items)
            twice = counts.most_common(1)[0][0]
            raise InputError(f"{what} has the key {_short(twice)} twice; keep one of them.")
        return found

    try:
        return json.loads(text.removeprefix(BOM), object_pairs_hook=pairs)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{what} is not JSON (it is nested too deeply); mend it.") from None
    except ValueError as error:  # besides wrong JSON, numbers of 4300 digits
        raise InputError(f"{what} is not JSON ({getattr(error, 'msg', error)}); mend it.") from None


def _short(name: str, most: int = 40) -> str:
    quoted = json.dumps(name, ensure_ascii=False)
    return quoted if len(quoted) <= most else f'{quoted[:most]}..."'
