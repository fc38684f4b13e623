"""What a mutator is, and the choices that all of them make."""

import enum
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any


class Expect(enum.IntEnum):
    """What may come of a mutant besides a refusal: other numbers, the same numbers only, or nothing."""

    FREE = 0
    SAME = 1
    REFUSED = 2


FREE, SAME, REFUSED = Expect
Judge = Callable[[bytes, bytes], Expect]  # of a file before and after
# Changes files in the folder that it is given; returns what it did, and what may come of it.
Mutator = Callable[[Random, Path], tuple[str, Expect]]


class Disagreement(Exception):
    """`weights_io.inspect` says something else than the load."""


@dataclass(frozen=True)
class Reader:
    name: str
    weight: int  # its share of all mutants
    make: Callable[[Path], None]  # writes the good files into an empty folder
    read: Callable[[Path], Any]  # the door; its result is compared with that of the good files (see `same`)
    mutators: Sequence[tuple[int, Mutator]]  # with weights
    seconds: float = 10.0  # of CPU
    needs: tuple[str, ...] = ("mlx.core",)  # modules without which it is left out
    loopback: bool = False  # it talks to a server in its own process

    def mutate(self, number: int, folder: Path) -> tuple[str, Expect]:
        """Make mutant ``number`` of the copy of the good files in ``folder``."""
        random = Random(f"{self.name}:{number}")
        (mutator,) = random.choices([m for _, m in self.mutators], [weight for weight, _ in self.mutators])
        return mutator(random, folder)


def always(expect: Expect) -> Judge:
    return lambda before, after: expect


def rewrite(folder: Path, name: str, change: Callable[[bytes], tuple[str, bytes]], judge: Judge) -> tuple[str, Expect]:
    """Change a file's bytes; the judge says what may come of it."""
    path = folder / name
    before = path.read_bytes()
    said, after = change(before)
    path.write_bytes(after)
    return f"{name}: {said}", judge(before, after)


def changed(name: str, *changes: Callable[[Random, bytes], tuple[str, bytes, Expect]]) -> Mutator:
    """Any of some changes to a file's bytes, which say themselves what may come of them."""

    def mutate(random: Random, folder: Path) -> tuple[str, Expect]:
        path = folder / name
        said, after, expect = random.choice(changes)(random, path.read_bytes())
        path.write_bytes(after)
        return f"{name}: {said}", expect

    return mutate


def shares(readers: Sequence[Reader], total: int) -> dict[str, int]:
    """How many of ``total`` mutants each reader gets: at least one, else by weight."""
    whole = sum(reader.weight for reader in readers)
    given = {reader.name: max(1, total * reader.weight // whole) for reader in readers}
    for reader in sorted(readers, key=lambda reader: -reader.weight):  # what rounding left over
        given[reader.name] += sum(given.values()) < total
    return given


def copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)


def same(found: Any, expected: Any) -> bool:
    """Whether two results are the same: arrays up to rounding, all else exactly."""
    import numpy as np

    if isinstance(expected, np.ndarray):
        if not isinstance(found, np.ndarray) or found.shape != expected.shape:
            return False
        return bool(np.allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(expected).max()))))
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(same(found[key], value) for key, value in expected.items())
        )
    if isinstance(expected, list | tuple):
        return isinstance(found, list | tuple) and len(found) == len(expected) and all(map(same, found, expected))
    return found == expected
