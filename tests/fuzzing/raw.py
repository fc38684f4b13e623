"""Mutators that know nothing of a file's format: bytes, and what may lie in a file's place."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from random import Random

from fuzzing.mutant import SAME, Expect, Judge, Mutator, rewrite

SPARSE = 20 * 2**30  # bytes that a file claims to have; it takes no room


def place(random: Random, size: int) -> int:
    """A position in a file: half of them in its first 4 kB, some near its end, where zips keep names."""
    kind = random.random()
    if kind < 0.5:
        return random.randrange(min(size, 4096) or 1)
    if kind < 0.7:
        return max(0, size - 1 - random.randrange(512))
    return random.randrange(size or 1)


def flip(random: Random, data: bytes) -> tuple[str, bytes]:
    changed = bytearray(data or b"\0")
    at = place(random, len(changed))
    changed[at] ^= 1 << random.randrange(8)
    return f"bit of byte {at} flipped", bytes(changed)


def flips(random: Random, data: bytes) -> tuple[str, bytes]:
    count = random.randrange(2, 9)
    for _ in range(count):
        _, data = flip(random, data)
    return f"{count} bits flipped", data


def overwrite(random: Random, data: bytes) -> tuple[str, bytes]:
    at, count = place(random, len(data)), random.choice([1, 2, 4, 8, 64])
    fill = random.choice([b"\0" * count, b"\xff" * count, random.randbytes(count), b"\x7f" + b"\xff" * (count - 1)])
    return f"{count} bytes from {at} on overwritten", data[:at] + fill + data[at + count :]


def truncate(random: Random, data: bytes) -> tuple[str, bytes]:
    at = random.choice([0, 1, place(random, len(data)), max(0, len(data) - 1)])
    return f"cut at byte {at} of {len(data)}", data[:at]


def insert(random: Random, data: bytes) -> tuple[str, bytes]:
    at, count = place(random, len(data)), random.choice([1, 2, 8, 100, 5000])
    return f"{count} bytes put in at {at}", data[:at] + random.randbytes(count) + data[at:]


def delete(random: Random, data: bytes) -> tuple[str, bytes]:
    at, count = place(random, len(data)), random.choice([1, 2, 8, 100])
    return f"{count} bytes taken out at {at}", data[:at] + data[at + count :]


def double(random: Random, data: bytes) -> tuple[str, bytes]:
    at, count = place(random, len(data)), random.choice([1, 8, 64, 1000, len(data)])
    return f"{count} bytes from {at} on twice", data[: at + count] + data[at:]


def append(random: Random, data: bytes) -> tuple[str, bytes]:
    more = random.choice([b"\0" * 8, b"\n", data, random.randbytes(50)])
    return f"{len(more)} bytes at the end", data + more


CHANGES = (flip, flip, flip, flips, overwrite, truncate, insert, delete, double, append)


def bytes_of(names: Sequence[str], judge: Judge) -> Mutator:
    """Bytes of one of the files; ``judge`` says what the format can tell."""

    def mutate(random: Random, folder: Path) -> tuple[str, Expect]:
        name, change = random.choice(names), random.choice(CHANGES)
        return rewrite(folder, name, lambda data: change(random, data), judge)

    return mutate


def spliced(names: Sequence[str], judge: Judge) -> Mutator:
    """The beginning of a file and the end of another, or of itself."""

    def mutate(random: Random, folder: Path) -> tuple[str, Expect]:
        name = random.choice(names)
        other = random.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        tail = other.read_bytes()

        def change(data: bytes) -> tuple[str, bytes]:
            first, second = random.randrange(len(data) + 1), random.randrange(len(tail) + 1)
            said = f"{first} of its bytes, then {other.relative_to(folder)} from byte {second} on"
            return said, data[:first] + tail[second:]

        return rewrite(folder, name, change, judge)

    return mutate


def special(names: Sequence[str]) -> Mutator:
    """Something else in the place of a file, or a file of no room that claims 20 GiB."""

    def mutate(random: Random, folder: Path) -> tuple[str, Expect]:
        path = folder / random.choice(names)
        kind = random.choice(
            ["FIFO", "socket", "folder", "/dev/zero", "/dev/full", "loop", "dangling", "sparse", "empty"]
        )
        head = path.read_bytes()
        path.unlink()
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as made:
                before = os.getcwd()
                os.chdir(path.parent)  # a socket's name has at most 107 characters
                made.bind(path.name)
                os.chdir(before)
        elif kind == "folder":
            path.mkdir()
        elif kind.startswith("/dev"):
            path.symlink_to(kind)
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "dangling":
            path.symlink_to("nothing")
        else:
            path.write_bytes(head if kind == "sparse" else b"")
            if kind == "sparse":
                os.truncate(path, SPARSE)
        return f"{path.name}: {kind} in its place", SAME

    return mutate
