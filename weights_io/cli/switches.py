"""Options that are on, off, or left to the model: ``--enable-thinking`` and ``--no-enable-thinking``."""

import dataclasses
import typing
from collections.abc import Iterable

from weights_io.errors import flag

TRUTH = {"t": "True", "true": "True", "f": "False", "false": "False"}  # as mlx_lm spells a truth value


class Switch:
    """Marks an option that is on, off or None: ``enable_thinking: Annotated[bool | None, Switch()] = None``."""


def switches_of(options: type) -> dict[str, str]:
    """The flags of the marked fields of a dataclass: the one that switches on -> the one that switches off."""
    hints = typing.get_type_hints(options, include_extras=True)
    marked = (
        field.name
        for field in dataclasses.fields(options)
        if any(isinstance(mark, Switch) for mark in getattr(hints[field.name], "__metadata__", ()))
    )
    return {flag(name): flag(f"no_{name}") for name in marked}


def with_values(options: type, words: Iterable[str]) -> list[str]:
    """A command line on which each switch has a value: ``--no-enable-thinking`` -> ``--enable-thinking False``.

    A switch that already has a value, as in ``--enable-thinking False``, keeps it.
    """
    switches = switches_of(options)
    off = {no: yes for yes, no in switches.items()}
    found: list[str] = []
    bare = False  # whether the last word is a switch without a value
    for word in words:
        if bare and word.lower() not in TRUTH:
            found.append("True")
        elif bare:
            word = TRUTH[word.lower()]
        bare = word in switches
        found += [off[word], "False"] if word in off else [word]
    return [*found, "True"] if bare else found
