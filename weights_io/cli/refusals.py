"""The sentence for a command line that cannot be parsed: which word is wrong, and what to give in its place."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from weights_io.errors import InputError, flag, listed, short

RULES = re.compile(r"[╭╮╰╯│─]+")  # the frame of tyro's errors
KINDS = {int: "a whole number", float: "a number", bool: "True or False"}
HELP = ("-h", "--help")


def refusal(options: type, words: Sequence[str], former: Mapping[str, str], prog: str, said: str = "") -> InputError:
    """The error for a command line that tyro refused.

    Arguments:
        options: the dataclass of the options.
        words: the command line.
        former: former name -> current name of an option.
        prog: the command as the user types it.
        said: what tyro printed. It is shortened to a sentence if the wrong word is not found here.
    """
    found = wrong_word(options, words, former, prog) or missing(options, words, former, prog)
    if found is not None:
        return found
    lines = (RULES.sub(" ", line).strip() for line in said.splitlines())
    text = " ".join(" ".join(line for line in lines if "help" not in line.lower()).split())
    return InputError(f"{text.rstrip('.') or 'this command line cannot be read'}; {see(prog)}")


def see(prog: str) -> str:
    return f"see {prog} --help."


def wrong_word(options: type, words: Sequence[str], former: Mapping[str, str], prog: str) -> InputError | None:
    """The error for the first unknown option, missing value or value of a wrong kind; None where there is none."""
    hints, names = typing.get_type_hints(options, include_extras=True), names_of(options) | former_flags(former)
    unknown = [name for name, _ in given(words) if name and name not in names and name not in HELP]
    if unknown:
        known = [name for name in names if name.startswith("--") and name not in former_flags(former)]
        close = difflib.get_close_matches(unknown[0], known, n=1)
        what = f"{listed(unknown, last=' and ')} {'is' if len(unknown) == 1 else 'are'} unknown"
        hint = f"did you mean {close[0]}? See {prog} --help." if close else see(prog)
        return InputError(f"{what}; {hint}")
    for name, values in given(words):
        if not name and values:
            return InputError(f"{short(values[0])} does not belong to an option; {see(prog)}")
        if name in names and (said := _wrong_values(hints[names[name]], values)):
            return InputError(said, names[name])
    return None


def missing(options: type, words: Sequence[str], former: Mapping[str, str], prog: str) -> InputError | None:
    """The error for required options that are not given; None where all are there."""
    names = names_of(options) | former_flags(former)
    there = {names.get(name) for name, _ in given(words)}
    lacking = [flag(f.name) for f in dataclasses.fields(options) if _required(f) and f.name not in there]
    if not lacking:
        return None
    return InputError(f"{listed(lacking, last=' and ')} must be given; {see(prog)}")


def names_of(options: type) -> dict[str, str]:
    """Flag, also a short one such as ``-p`` -> field."""
    hints, found = typing.get_type_hints(options, include_extras=True), {}
    for field in dataclasses.fields(options):
        found[flag(field.name)] = field.name
        for mark in getattr(hints[field.name], "__metadata__", ()):
            found |= dict.fromkeys(getattr(mark, "aliases", None) or (), field.name)
    return found


def former_flags(former: Mapping[str, str]) -> dict[str, str]:
    return {flag(name): field for name, field in former.items()}


def given(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option of a command line with its values; first ``""`` with the words before any option."""
    name: str = ""
    values: list[str] = []
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            yield name, values
            name, equals, value = word.partition("=")
            name, values = (name.replace("_", "-") if name.startswith("--") else name), [value] if equals else []
        else:
            values.append(word)
    yield name, values


def _required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _wrong_values(hint: Any, values: Sequence[str]) -> str | None:
    """What is wrong with the values of an option, as the end of a sentence that begins with its name."""
    kind, count, switch = _kind_of(hint)
    if switch:
        return f"takes no value, and {short(values[0])} follows it; leave that out." if values else None
    if not values and count is not None:
        return f"needs {_described(kind)}; none is given."
    for value in values if count is None else values[:count]:
        if not _holds(kind, value):
            return f"is {short(value)}; it must be {_described(kind)}."
    if count is not None and len(values) < count:
        return f"needs {count} values; {len(values)} {'is' if len(values) == 1 else 'are'} given."
    if count is not None and len(values) > count:
        return f"takes {count} value{'s' * (count > 1)}; {short(values[count])} follows and belongs to no option."
    return None


def _kind_of(hint: Any) -> tuple[Any, int | None, bool]:
    """The type of one value, the number of values (None: any), and whether the option is a switch without a value."""
    import tyro

    marks = getattr(hint, "__metadata__", ())
    hint = hint.__origin__ if marks else hint
    if hint is bool:
        return bool, 1, tyro.conf.FlagConversionOff not in marks
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        rest = [one for one in typing.get_args(hint) if one is not type(None)]
        if rest == [bool]:  # a `Switch`, which has a value by now
            return bool, 1, False
        return _kind_of(rest[0]) if len(rest) == 1 else (str, None, False)
    if typing.get_origin(hint) is tuple:
        inner, *others = typing.get_args(hint)
        kind = inner if typing.get_origin(inner) is not tuple else typing.get_args(inner)[0]
        return kind, None if others == [Ellipsis] else 1 + len(others), False
    return hint, 1, False


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return listed(typing.get_args(kind), most=12, last=" or ")
    return KINDS.get(kind, "a path" if kind is Path else "a text")


def _holds(kind: Any, value: str) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in map(str, typing.get_args(kind))
    if kind is bool:
        return value in ("True", "False")
    try:
        kind(value)
    except (TypeError, ValueError):
        return kind not in (int, float)
    return True
