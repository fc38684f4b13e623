"""Mutators of safetensors, GGUF and protobuf files: their headers, lengths and counts."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import trees
from fuzzing.mutant import FREE, SAME, Expect, Mutator, changed, rewrite

U64 = [0, 1, 7, 2**16, 2**27, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
U32 = [value for value in U64 if value < 2**32]


def header_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def with_header(data: bytes, header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data[8 + len(header_of(data)) :]


def safetensors_judge(before: bytes, after: bytes) -> Expect:
    """What lies behind the header may be anything of the same size; in the header a type may change, and two places."""
    old, new = header_of(before), header_of(after)
    if old == new:
        return FREE if len(before) == len(after) else SAME
    try:
        first, second = trees.parse(old), trees.parse(new)
        same_form = [name for name, _ in first] == [name for name, _ in second]
        pairs = zip(first, second, strict=True) if same_form else ()
        alike = same_form and all(
            a == b or [k for k, _ in a] == [k for k, _ in b] and dict(a).get("shape") == dict(b).get("shape")
            for (name, a), (_, b) in pairs
            if name != "__metadata__"
        )
    except (ValueError, RecursionError, TypeError):
        return SAME
    return FREE if alike else SAME


def safetensors_of(name: str) -> Mutator:
    """The header's JSON, its length, or its names."""

    def mutate(random: Random, folder: Path) -> tuple[str, Expect]:
        def change(data: bytes) -> tuple[str, bytes]:
            kind = random.random()
            if kind < 0.15:
                length = random.choice(
                    [*U64, len(header_of(data)) - 1, len(header_of(data)) + 1, len(data) - 8, len(data)]
                )
                return f"header of {length} bytes", struct.pack("<Q", length) + data[8:]
            if kind < 0.25:  # the same header, written otherwise
                header = trees.parse(header_of(data))
                random.shuffle(header)
                return "header shuffled", with_header(data, trees.dump(header).encode())
            said, text = trees.change_text(random, header_of(data))
            return f"header: {said}", with_header(data, text)

        return rewrite(folder, name, change, safetensors_judge)

    return mutate


@dataclass(frozen=True)
class Field:
    """A part of a GGUF file."""

    start: int
    end: int
    kind: str  # magic | version | count | length | key | type | value | dims | size | name | place | data
    of: str = ""  # key or tensor


SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class Gguf:
    """Where what lies in a (good) GGUF file."""

    def __init__(self, data: bytes):
        self.data, self.at, self.fields = data, 0, list[Field]()
        self.take(4, "magic")
        self.take(4, "version")
        tensors, keys = self.number(8, "count", "tensors"), self.number(8, "count", "keys")
        for _ in range(keys):
            key = self.string("key")
            self.value(self.number(4, "type", key), key)
        for _ in range(tensors):
            name = self.string("name")
            dims = self.number(4, "dims", name)
            for _ in range(dims):
                self.number(8, "size", name)
            self.number(4, "type", name)
            self.number(8, "place", name)
        self.header = self.at
        self.fields.append(Field(self.at, len(data), "data"))

    def take(self, size: int, kind: str, of: str = "") -> bytes:
        self.fields.append(Field(self.at, self.at + size, kind, of))
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int, kind: str, of: str = "") -> int:
        return int.from_bytes(self.take(size, kind, of), "little")

    def string(self, kind: str, of: str = "") -> str:
        return self.take(self.number(8, "length", of), kind, of).decode()

    def value(self, kind: int, key: str) -> None:
        if kind == 8:
            self.string("value", key)
        elif kind == 9:
            inner, count = self.number(4, "type", key), self.number(8, "count", key)
            for _ in range(count):
                self.value(inner, key)
        else:
            self.take(SIZES[kind], "value", key)

    def field_at(self, at: int) -> Field:
        return next(field for field in self.fields if field.start <= at < field.end)


def gguf_judge(before: bytes, after: bytes) -> Expect:
    """Values and data can be anything; nothing else can."""
    if len(before) != len(after):
        return SAME
    file = Gguf(before)
    touched = {file.field_at(i).kind for i in range(file.header) if before[i] != after[i]}
    return SAME if touched - {"value", "data"} else FREE


def gguf_of(name: str) -> Mutator:
    """One field of the header."""
    return changed(name, lambda random, data: gguf_change(random, data, Gguf(data)))


def gguf_change(random: Random, data: bytes, file: Gguf) -> tuple[str, bytes, Expect]:
    kinds = sorted({field.kind for field in file.fields} - {"data", "magic"})
    kind = random.choice([*kinds, "key", "key", "bomb", "twice", "value"])
    if kind == "bomb":  # many keys, or one key with many items of few bytes each
        count = random.choice([1000, 200_000])
        item = random.choice([(8, b"\0" * 8), (0, b"\0"), (9, struct.pack("<IQ", 0, 0)), (7, b"\1")])
        entry = _text("zq") + struct.pack("<IIQ", 9, item[0], count) + item[1] * count
        keys = b"".join(_text(f"zq{i}") + struct.pack("<IB", 7, 1) for i in range(count))
        more, added = random.choice([(entry, 1), (keys, count)])
        return f"{added} keys more, of {len(more)} bytes", _with_keys(data, more, added), SAME
    if kind == "twice":
        key = random.choice([field for field in file.fields if field.kind == "key"]).of or "general.architecture"
        return f"key {key} twice", _with_keys(data, _text(key) + struct.pack("<II", 4, 1), 1), SAME
    known = [field for field in file.fields if field.kind == kind]
    of = random.choice(sorted({field.of for field in known}))  # else a vocabulary's entries drown the others
    field = random.choice([field for field in known if field.of == of])
    if kind in ("key", "name") or (kind == "value" and field.end - field.start > 8):
        text = data[field.start : field.end].decode(errors="replace")
        other = trees.look_alike(random, text)
        length = struct.pack("<Q", len(other.encode()))
        longer = data[: field.start - 8] + length + other.encode() + data[field.end :]
        # The data begin at a multiple of 32, so that a longer header moves them.
        longer = _padded(data, file.header, longer, len(other.encode()) - (field.end - field.start))
        return f"{kind} {text[:60]} renamed {other[:60]}", longer, FREE if kind == "value" else SAME
    size = field.end - field.start
    value = random.choice(U64 if size == 8 else U32) if random.random() < 0.7 else random.getrandbits(8 * size)
    value = value % 2 ** (8 * size) if size else 0
    if kind in ("type", "dims") and random.random() < 0.7:
        value = random.randrange(14 if kind == "type" else 6)
    other_data = data[: field.start] + value.to_bytes(size, "little") + data[field.end :]
    free = kind == "value" or (kind == "type" and field.of.endswith("weight"))
    return f"{kind} of {field.of[:60]} = {value}", other_data, FREE if free else SAME


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _padded(data: bytes, header: int, longer: bytes, more: int) -> bytes:
    """``longer`` with its data where they belong, when its header has grown by ``more`` bytes."""
    start, now = -(-header // 32) * 32, header + more
    return longer[:now] + b"\0" * (-now % 32) + data[start:]


def _with_keys(data: bytes, entries: bytes, count: int) -> bytes:
    """With more metadata, in front of the others."""
    counts = struct.pack("<Q", int.from_bytes(data[16:24], "little") + count)
    return _padded(data, Gguf(data).header, data[:16] + counts + entries + data[24:], len(entries))


def varints(data: bytes, start: int = 0, end: int | None = None, depth: int = 0) -> Iterator[tuple[int, int]]:
    """(where, how many bytes) of the keys, numbers and lengths of a good protobuf message."""
    at, end = start, len(data) if end is None else end

    def number(at: int) -> tuple[int, int]:
        value, size = 0, 0
        while True:
            byte = data[at + size]
            value |= (byte & 127) << 7 * size
            size += 1
            if byte < 128:
                return value, size

    while at < end:
        key, size = number(at)
        yield at, size
        at += size
        if key & 7 in (0, 2):
            value, size = number(at)
            yield at, size
            at += size
        if key & 7 == 2 and depth < 1:
            yield from varints(data, at, at + value, depth + 1)
        at += {0: 0, 1: 8, 2: value if key & 7 == 2 else 0, 5: 4}[key & 7]


def protobuf_of(name: str) -> Mutator:
    """A key, number or length of the message or of its parts. Such a file has no check of anything."""

    def mutate(random: Random, folder: Path) -> tuple[str, Expect]:
        def change(data: bytes) -> tuple[str, bytes]:
            at, size = random.choice(list(varints(data)))
            value: Any = random.choice(
                [b"\0", b"\1", b"\x7f", b"\xff\xff\xff\x7f", b"\xff" * 9 + b"\1", b"\xff" * 100_000]
            )
            return f"{size} bytes of a varint at {at} become {len(value)}", data[:at] + value + data[at + size :]

        return rewrite(folder, name, change, lambda before, after: FREE)

    return mutate
