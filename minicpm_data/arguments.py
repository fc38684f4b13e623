"""Checks of arguments that a Python program passes: types of numbers, and names of keywords."""

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable
from typing import ParamSpec, TypeVar

from weights_io.errors import InputError, short

P = ParamSpec("P")
R = TypeVar("R")
# Names in other libraries -> the name here.
ELSEWHERE = {"temp": "temperature", "max_new_tokens": "max_tokens", "max_length": "max_tokens"}
ELSEWHERE |= {"sampler": "temperature", "adapter_path": "adapter", "torch_dtype": "dtype", "eos_token": "stop"}


def check_number(name: str, value: object, whole: bool = False) -> None:
    """Raise `InputError` where ``value`` is no number, or not a ``whole`` one. Numbers of numpy, JAX and MLX are."""
    number = None
    if not isinstance(value, str | bytes | bool) and hasattr(value, "__float__"):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):  # an array of several numbers; an integer of 400 digits
            number = 0.0 if isinstance(value, int) else None
    if number is None:
        raise InputError(f"is {short(repr(value))}; it must be a number.", option=name)
    if whole and not isinstance(value, int) and not number.is_integer():
        raise InputError(f"is {short(repr(value))}; it must be a whole number.", option=name)


def check_whole_numbers(name: str, values: object) -> None:
    """Raise `InputError` where ``values`` is no list of whole numbers."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InputError(f"is {short(repr(values))}; it must be a list of whole numbers.", option=name)
    for value in values:
        check_number(name, value, whole=True)


def check_path(name: str, value: object) -> None:
    """Raise `InputError` where ``value`` is neither a text nor a path."""
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"is {short(repr(value))}; it must be the name of a folder, as a text or a path.", option=name)


def check_model(name: str, value: object) -> None:
    """Raise `InputError` where ``value`` is no model."""
    if not hasattr(value, "config"):
        raise InputError(f"is {short(repr(value))}; give the model that load returns.", option=name)


def check_keywords(given: Iterable[str], known: Collection[str]) -> None:
    """Raise `TypeError` for a keyword that is not known, with the nearest known one."""
    for name in given:
        if name not in known:
            near = [ELSEWHERE[name]] if ELSEWHERE.get(name) in known else difflib.get_close_matches(name, known, 1, 0.7)
            hint = f"did you mean {near[0]!r}?" if near else f"the keywords are {', '.join(sorted(known))}."
            raise TypeError(f"unexpected keyword argument {short(name)!r}; {hint}")


def named_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with `check_keywords` before each call."""
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind != p.POSITIONAL_ONLY]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        check_keywords(kwargs, known)
        return function(*args, **kwargs)

    return checked
