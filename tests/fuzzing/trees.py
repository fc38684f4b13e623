"""Mutators of JSON: an object's keys and values, in a file, in a header or in one line; what JSON can tell."""

import copy
import difflib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.mutant import FREE, REFUSED, SAME, Expect, Judge, Mutator, rewrite


class Pairs(list):
    """An object: (key, value) pairs, among which a key may come twice."""


class Raw(str):
    """Text that stands in the JSON as it is."""


def parse(data: bytes | str) -> Any:
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    return json.loads(text, object_pairs_hook=Pairs)


def dump(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{dump(key)}: {dump(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


NUMBERS = [
    0,
    -1,
    1,
    2,
    7,
    2**31 - 1,
    2**31,
    2**32,
    -(2**31),
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    0.5,
    -0.5,
    1e-45,
]
NUMBERS += [1e-5, 1e38, 1e39, 1e308, Raw("1e999"), Raw("-0.0"), Raw("9" * 5000), Raw("NaN"), Raw("Infinity")]
NUMBERS += [Raw("-Infinity"), Raw("0x10"), Raw("1_000"), Raw("01")]
TEXTS = [
    "",
    " ",
    "x" * 1000,
    "x" * 1_000_000,
    "\0",
    "\n\n",
    "\x1b[2Jx",
    "../../outside",
    "/etc/passwd",
    "{}" * 50,
    "中" * 300,
]
TEXTS += [Raw('"\\ud800"'), Raw('"\\u0000"'), "{{ x }}", "%s%n", "None", "true", "1", "\u202e", "nan"]
VALUES = [None, True, False, 0, 1, -1, 0.5, "", "text", [], Pairs(), [[]], [None], ["text"], [1, 2], Pairs([("a", 1)])]
DEPTHS = (50, 900, 100_000)
ALIKE = {"a": "а", "o": "0", "e": "е", "l": "1", "i": "í", "_": "-", "s": "ѕ"}  # some are Cyrillic


def bulk(random: Random) -> Raw:
    """A value of a megabyte, or one nested deeply."""
    depth, count = random.choice(DEPTHS), random.choice([1000, 300_000])
    forms = ["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" + "0," * count + "0]"]
    return Raw(random.choice([*forms, "{" + ",".join(f'"k{i}":{i}' for i in range(count)) + "}"]))


def look_alike(random: Random, key: str) -> str:
    """``key`` with another character somewhere."""
    if not key:
        return "_"
    at = random.randrange(len(key))
    kind = random.randrange(5)
    if kind == 0:
        return key[:at] + key[at + 1 :]
    if kind == 1:
        return key[:at] + key[at] + key[at:]
    if kind == 2 and key[at] in ALIKE:
        return key[:at] + ALIKE[key[at]] + key[at + 1 :]
    if kind == 3:
        return key[:at] + key[at].swapcase() + key[at + 1 :] if key[at].isalpha() else key + " "
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz_0" if letter != key[at]]
    return key[:at] + random.choice(letters) + key[at + 1 :]


def containers(value: Any) -> Iterator[Any]:
    """Every object and array that is not empty, the outermost first."""
    waiting = deque([value])
    while waiting:
        found = waiting.popleft()
        if isinstance(found, list) and found:
            yield found
            waiting += [item[1] if isinstance(found, Pairs) else item for item in found]


def descend(random: Random, value: Any) -> Any:
    """One of its containers: outer ones are likelier, and large ones do not drown the others."""
    while True:
        children = [item[1] if isinstance(value, Pairs) else item for item in value]
        inner = [child for child in children if isinstance(child, list) and child]
        if not inner or random.random() < 0.4:
            return value
        value = random.choice(inner)


def other_value(random: Random, value: Any) -> Any:
    kind = random.random()
    if kind < 0.35 and type(value) in (int, float):
        return random.choice([*NUMBERS, -value, value + 1, value * 2, float(value), value + 0.5])
    if kind < 0.35 and isinstance(value, str):
        return random.choice([*TEXTS, look_alike(random, value), value + "x", value.upper(), value + "\n"])
    if kind < 0.35 and isinstance(value, bool):
        return random.choice([not value, 0, 1, 0.0, "true", "false", "", []])
    if kind < 0.7:
        return copy.deepcopy(random.choice(VALUES))
    if kind < 0.8:
        return random.choice([[value], Pairs([("value", value)]), str(value), [value, value]])
    return random.choice([*NUMBERS, *TEXTS]) if kind < 0.95 else bulk(random)


def change(random: Random, document: Any) -> tuple[str, Any]:
    """A changed copy of a parsed document (an object or an array that is not empty)."""
    document = copy.deepcopy(document)
    inside = descend(random, document)
    at = random.randrange(len(inside))
    kind = random.choice(("value",) * 4 + ("delete", "twice", "twice", "unknown", "look-alike", "look-alike", "swap"))
    if not isinstance(inside, Pairs):
        before = inside[at]
        if kind == "delete":
            del inside[at]
        elif kind == "twice":
            inside.insert(at, before)
        elif isinstance(before, str) and kind == "look-alike":
            inside[at] = look_alike(random, before)
        else:
            inside[at] = other_value(random, before)
        return f"item {at} {kind}", document
    key, before = inside[at]
    said = f"{kind} {key:.60}"
    if kind == "value":
        inside[at] = (key, other_value(random, before))
        said = f"{key:.60} = {dump(inside[at][1]):.60}"
    elif kind == "delete":
        del inside[at]
    elif kind == "twice":
        again = random.choice([before, other_value(random, before)])
        inside.insert(random.choice([at, at + 1, len(inside)]), (key, again))
        said = f"{key:.60} twice, also = {dump(again):.60}"
    elif kind == "unknown":
        name = f"zq_{random.randrange(10**6)}"
        inside.insert(at, (name, copy.deepcopy(random.choice([True, 1, 0.5, "text", [1], Pairs([("a", 1)])]))))
        said = f"unknown key {name}"
    elif kind == "look-alike":
        inside[at] = (look_alike(random, key), before)
        said = f"{key:.60} renamed {inside[at][0]:.60}"
    else:
        second = random.randrange(len(inside))
        inside[at], inside[second] = (key, inside[second][1]), (inside[second][0], before)
        said = f"values of {key:.60} and {inside[second][0]:.60} exchanged"
    return said, document


def change_text(random: Random, data: bytes) -> tuple[str, bytes]:
    said, document = change(random, parse(data))
    text = dump(document)
    if random.random() < 0.03:
        said, text = f"{said}, after a BOM", "\ufeff" + text
    return said, text.encode("utf-8", "surrogatepass")


def json_of(name: str, judge: Judge) -> Mutator:
    """One change of the JSON file ``name``."""

    def mutate(random: Random, folder: Path) -> tuple[str, Expect]:
        return rewrite(folder, name, lambda data: change_text(random, data), judge)

    return mutate


def json_judge(
    added: Expect = SAME,
    twice: Expect = REFUSED,
    positive: bool = False,
    free: Callable[[str], bool] | None = None,
    passed_over: bool = False,
) -> Judge:
    """What JSON can tell (see the package's docstring). ``added``: of keys that are not known; ``twice``: of a
    key that is there already; ``positive``: numbers above 0 have to stay so; ``free``: paths, such as ``model/vocab``,
    within which nothing can be told; ``passed_over``: keys that are not known are, so that a key with another name is
    as one that is missing, unless it differs by a character."""

    def judge(before: bytes, after: bytes) -> Expect:
        try:
            old, new = parse(before), parse(after)
            if any(len(dict(keyed)) < len(keyed) for keyed in containers(new) if isinstance(keyed, Pairs)):
                return twice
            told = list(_told(old, new, "", added, positive, free or (lambda path: False)))
            if passed_over and isinstance(old, Pairs) and isinstance(new, Pairs):
                gone, come = dict(old).keys() - dict(new).keys(), dict(new).keys() - dict(old).keys()
                if gone and not any(_unlike(a, b) <= 2 for a in gone for b in come):
                    return FREE
        except (ValueError, RecursionError):
            return SAME
        values = [expect for kind, expect in told if kind == "value"]
        if REFUSED in (expect for _, expect in told) or SAME in values:
            return max(expect for _, expect in told)
        return FREE if values else max((expect for _, expect in told), default=SAME)

    return judge


def _told(
    old: Any, new: Any, path: str, added: Expect, positive: bool, free: Callable[[str], bool]
) -> Iterator[tuple[str, Expect]]:
    """("key" or "value", what may come of it) of each difference."""
    if free(path):
        if old != new:
            yield "value", FREE
    elif isinstance(old, Pairs) and isinstance(new, Pairs):
        before, after = dict(old), dict(new)
        for key in after.keys() - before.keys():
            yield "key", FREE if free(f"{path}{key}/") else added
        for key, value in before.items():
            if key in after:
                yield from _told(value, after[key], f"{path}{key}/", added, positive, free)
            else:
                yield "key", FREE
    elif isinstance(old, list) and isinstance(new, list) and isinstance(old, Pairs) == isinstance(new, Pairs):
        if len(old) != len(new):
            yield "value", FREE  # one item more or less: those behind it are others
            return
        for first, second in zip(old, new, strict=True):
            yield from _told(first, second, path, added, positive, free)
    elif _kind(old) != _kind(new):
        yield "value", FREE if old is None or new is None else SAME
    elif isinstance(new, float) and not math.isfinite(new):
        yield "value", SAME
    elif old != new:
        numbers = _kind(old) == "number"
        yield "value", SAME if numbers and positive and old > 0 >= new else FREE


def _unlike(first: str, second: str) -> int:
    """How many characters only one of two keys has."""
    alike = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    return len(first) + len(second) - 2 * sum(block.size for block in alike)


def _kind(value: Any) -> str:
    number = type(value) in (int, float)
    return "number" if number else "object" if isinstance(value, Pairs) else type(value).__name__


def lines_of(name: str, judge: Judge) -> Mutator:
    """One change of one line of a ``.jsonl`` file."""

    def mutate(random: Random, folder: Path) -> tuple[str, Expect]:
        lines = (folder / name).read_bytes().splitlines()
        at = random.randrange(len(lines))
        said, changed = change_text(random, lines[at])
        expect = judge(lines[at], changed)
        lines[at] = changed.replace(b"\n", b"")
        (folder / name).write_bytes(b"\n".join(lines) + b"\n")
        return f"{name}, line {at + 1}: {said}", expect

    return mutate


def lines_judge(judge: Judge) -> Judge:
    """Of changed bytes anywhere in a ``.jsonl`` file."""

    def of_lines(before: bytes, after: bytes) -> Expect:
        old, new = before.splitlines(), after.splitlines()
        if len(old) != len(new):
            return FREE  # a line more or less is no fault
        return max((judge(a, b) for a, b in zip(old, new, strict=True) if a != b), default=SAME)

    return of_lines
