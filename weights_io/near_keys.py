"""Keys of files in which most say nothing here: one that is nearly a key that is used is a slip, and is refused."""

import difflib
from collections.abc import Collection, Iterable

from weights_io.errors import InputError, short

MOST_UNKNOWN = 1000  # keys of one file that are not known; real ones have some dozens
MOST_DIFFERENT = 3  # characters that only one of two keys has: another one counts twice, "_id" at the end three times


def refuse_near_keys(given: Iterable[str], used: Collection[str], others: Collection[str], source: object) -> None:
    """`InputError` where a key is not known and nearly one that is used and is not there itself.

    Arguments:
        given: the keys of a file or of an object in it.
        used: those that are looked at.
        others: those that are known to say nothing, however near they are.
        source: names the file in an error.
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
