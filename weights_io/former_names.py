"""Options that were renamed: the former names go on working as flags and as keywords, and no help shows them.

batch_size: Annotated[int, Former("batch")] = 1
"""

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from weights_io.errors import InputError


class Former:
    """In the annotation of a dataclass's field: the names that it is given by besides its own."""

    def __init__(self, *names: str) -> None:
        self.names = names


def former_names(options: type) -> dict[str, str]:
    """Former name -> field, of a dataclass."""
    hints = typing.get_type_hints(options, include_extras=True)
    return {
        former: field.name
        for field in dataclasses.fields(options)
        for mark in getattr(hints[field.name], "__metadata__", ())
        if isinstance(mark, Former)
        for former in mark.names
    }


def present_names(options: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values under the fields' own names. `InputError` where one is given under two names."""
    former = former_names(options)
    for name in given:
        if former.get(name) in given:
            raise InputError(f"is the former name of {{{former[name]}}}; give one of them.", name, [former[name]])
    return {former.get(name, name): value for name, value in given.items()}


def present_flags(options: type, flags: Iterable[str]) -> list[str]:
    """A command line's words, with ``--batch`` and ``--batch=2`` as the flags of the fields' own names."""
    former = former_names(options)
    words = []
    for word in flags:
        name, equals, value = word.partition("=")
        field = former.get(name[2:].replace("-", "_")) if name.startswith("--") else None
        words.append(word if field is None else f"--{field.replace('_', '-')}{equals}{value}")
    return words
