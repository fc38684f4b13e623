"""Find misspelled keys in files where most keys are ignored."""

import difflib
from collections.abc import Collection, Iterable

from weights_io.errors import InputError, short

MOST_UNKNOWN = 1000  # unknown keys in one file; real files have a few dozen
MOST_DIFFERENT = 3  # characters that only one of two keys has: a substitution counts 2, an added "_id" counts 3


def refuse_near_keys(given: Iterable[str], used: Collection[str], others: Collection[str], source: object) -> None:
    """Refuse an unknown key that resembles a key which is used and is missing.

    Arguments:
        given: the keys of a file or of an object in it.
        used: the keys that are read.
        others: known keys that are ignored, even if they resemble a used one.
        source: the file's name in messages.

    Raises:
        InputError: there is such a key, or there are more than `MOST_UNKNOWN` unknown keys.
    """
    keys = set(given)
    unknown = sorted(keys.difference(used, others))
    if len(unknown) > MOST_UNKNOWN:
        raise InputError(f"{source} has {len(unknown)} keys that are not known; download it again.")
    for key in unknown:
        for name in sorted(set(used) - keys):
            alike = 1 - (MOST_DIFFERENT + 0.5) / (len(key) + len(name))
            if difflib.get_close_matches(name, [key], 1, max(alike, 0.0)):
                raise InputError(f"{source} has {short(key)}, which is no key; write {name}.")
