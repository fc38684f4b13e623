"""Mutators of zip archives (``pytorch_model.bin``, ``.npz``) and of the pickle in one: names, sizes, opcodes."""

import io
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

from fuzzing import raw
from fuzzing.binary import U32
from fuzzing.mutant import FREE, REFUSED, SAME, Expect, Mutator, changed
from fuzzing.trees import look_alike

CANARY = "canary"  # a file that no reader makes
SHELL = f"touch {CANARY}"
PYTHON = f"import os; os.system('{SHELL}')"
Entries = list[tuple[zipfile.ZipInfo, bytes]]


def read(data: bytes) -> Entries:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]


def write(entries: Entries) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for info, data in entries:
            fresh = zipfile.ZipInfo(info.filename)
            fresh.compress_type = info.compress_type
            archive.writestr(fresh, data)
    return file.getvalue()


def added(name: str, data: bytes = b"", kind: int = zipfile.ZIP_STORED) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.compress_type = kind
    return info, data


def zip_of(name: str, renaming: Expect = SAME) -> Mutator:
    """The archive's entries, or a field of its directory. ``renaming``: what may come of an entry with another name."""

    def of_name(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
        return *renamed(random, data), renaming

    rare = (entry_twice, compressed, bomb, of_name, wrong_sum)
    return changed(name, *rare, odd_name, odd_name, directory_field, directory_field)


def entry_twice(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    entries = read(data)
    info, content = random.choice(entries)
    _, other = raw.flip(random, content or b"x")
    entries.insert(random.randrange(len(entries) + 1), (info, random.choice([content, other, b""])))
    return f"entry {info.filename} twice", write(entries), REFUSED


def compressed(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    entries = read(data)
    info, _ = random.choice(entries)
    info.compress_type = random.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    return f"entry {info.filename} compressed", write(entries), SAME


def bomb(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    """One of the entries unpacks to 2 GB of zeros."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    size, packed = 2**31, block * 128 + packer.flush()
    entries = read(data)
    at = random.randrange(len(entries))
    name = entries[at][0].filename
    entries[at] = added(name, packed)
    stored = bytearray(write(entries))
    for signature, method, unpacked, names in ((b"PK\3\4", 8, 22, 30), (b"PK\1\2", 10, 24, 46)):
        start = stored.find(signature)
        while stored[start + names : start + names + len(name)] != name.encode():
            start = stored.find(signature, start + 1)
        struct.pack_into("<H", stored, start + method, zipfile.ZIP_DEFLATED)
        struct.pack_into("<I", stored, start + unpacked, size)
    return f"entry {name} unpacks to {size} bytes", bytes(stored), SAME


def odd_name(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    entries = read(data)
    root = entries[0][0].filename.split("/")[0]
    names = ["../outside", "/tmp/outside", "..\\outside", "C:\\outside", "", "x" * 60_000, f"{root}/data/zq", "\x1b[2J"]
    names += [
        "other/data.pkl",
        f"{root}/code/zq.py",
        f"{root}/constants.pkl",
        f"{root}/../{root}/data.pkl",
        "数据",
        "a\nb",
    ]
    name = random.choice(names)
    entries.insert(random.choice([0, len(entries)]), added(name, random.choice([b"", b"zq", entries[0][1]])))
    return f"an entry more, {name!r:.60}", write(entries), SAME


def renamed(random: Random, data: bytes) -> tuple[str, bytes]:
    entries = read(data)
    info, _ = random.choice(entries)
    before = info.filename
    info.filename = look_alike(random, before)
    return f"entry {before} renamed {info.filename!r:.60}", write(entries)


def directory_field(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    """A number of a local header, of the directory or of its end; none of them says less than the others."""
    signature, fields = random.choice(
        [
            (b"PK\3\4", [(4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)]),
            (
                b"PK\1\2",
                [(6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (34, 2), (42, 4)],
            ),
            (b"PK\5\6", [(4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)]),
        ]
    )
    places = [at for at in range(len(data) - 4) if data[at : at + 4] == signature]
    (at, size), start = random.choice(fields), random.choice(places or [0])
    value = random.choice(U32) % 2 ** (8 * size)
    changed = data[: start + at] + value.to_bytes(size, "little") + data[start + at + size :]
    return f"{signature[2:].hex()} at {start}: field {at} = {value}", changed, SAME


def wrong_sum(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    info, content = random.choice([entry for entry in read(data) if entry[1]])
    name, extra = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
    at = info.header_offset + 30 + name + extra
    _, flipped = raw.flip(random, content)
    return f"a bit of {info.filename} flipped", data[:at] + flipped + data[at + len(content) :], SAME


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def called(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


HUGE = b"\xff\xff\xff\x7f"
NEST = b"2\x86"  # (x, x) of x: sixty of them have 2**60 leaves
# What leaves the stack as it was (0 is POP), if it runs at all.
CALLS = {
    "os.system": called("os", "system", text(SHELL)),
    "posix.system": called("posix", "system", text(SHELL)),
    "exec": called("builtins", "exec", text(PYTHON)),
    "eval": called("__builtin__", "eval", text(f"__import__('os').system('{SHELL}')")),
    "subprocess.Popen": called("subprocess", "Popen", text(SHELL)),
    "a function of the canary's": called("fuzzing.worker", "touched"),
    "INST": b"(" + text(SHELL) + b"ios\nsystem\n",
    "OBJ": b"(cos\nsystem\n" + text(SHELL) + b"o",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93(" + text(SHELL) + b"tR",
    "NEWOBJ": b"cos\n_wrap_close\n(t\x81",
    "BUILD": b"ccollections\nOrderedDict\n)R}" + text("__class__") + text("x") + b"sb",
    "BUILD of a dtype": b"ctorch\nFloatStorage\n}" + text("dtype") + b"Nsb",
    "a name with dots": b"\x80\x04" + text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93",
    "torch.load": called("torch", "load", text("/etc/passwd")),
    "EXT1": b"\x82\x01",
    "PERSID": b"Pstorage\n",
    "BINPERSID": b"(" + text("module") + text(SHELL) + b"tQ",
    "BINPERSID of a tuple of 2**60": b")" + NEST * 60 + b"Q",
}
BOMBS = {
    "a memo of 2**31": b"K\1r" + HUGE,
    "a memo of 2 billion": b"K\1p2000000000\n",
    "a memo of 300 million": b"K\1r" + struct.pack("<I", 300_000_000),
    "GET of 2**31": b"j" + HUGE,
    "a string of 4 GB": b"X\xff\xff\xff\xff",
    "a string of 2**62": b"\x8d" + struct.pack("<Q", 2**62),
    "bytes of 3 GB": b"\x8e" + struct.pack("<Q", 3 * 2**30),
    "a bytearray of 3 GB": b"\x96" + struct.pack("<Q", 3 * 2**30),
    "a frame of 2**62": b"\x95" + struct.pack("<Q", 2**62),
    "a whole number of 2 GB": b"\x8b" + HUGE,
    "a whole number of 100,000 digits": b"I" + b"9" * 100_000 + b"\n",
    "a hash of 2**60 parts": b"})" + NEST * 60 + b"Ns",
    "a set of 2**60 parts": b"\x8f()" + NEST * 60 + b"\x90",
    "a million marks": b"(" * 1_000_000 + b"t" * 1_000_000,
    "a million tuples, each in the next": b")" + b"\x85" * 1_000_000,
    "a million lists, each in the next": b"]" * 100_000 + b"a" * 99_999,
    "ten million copies": b"N" + b"2" * 10_000_000 + b"0" * 10_000_000,
    "a list of itself": b"]q\xf02a",
    "500,000 calls": b"ccollections\nOrderedDict\n" + b")R0ccollections\nOrderedDict\n" * 50_000 + b")R",
}


def pickle_of(name: str) -> Mutator:
    """The pickle in the archive ``name``, whose sums are then right."""

    def within(change: Callable[[Random, bytes], tuple[str, bytes, Expect]]) -> Any:
        def of_archive(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
            entries = read(data)
            at = next(i for i, (info, _) in enumerate(entries) if info.filename.endswith("data.pkl"))
            said, pickled, expect = change(random, entries[at][1])
            entries[at] = entries[at][0], pickled
            return f"pickle: {said}", write(entries), expect

        return of_archive

    return changed(name, *map(within, [opcodes, opcodes, opcodes, bytes_of, names, key_again]))


def opcodes(random: Random, pickled: bytes) -> tuple[str, bytes, Expect]:
    """More opcodes between two others, or some of them taken out or twice."""
    places = [place for _, _, place in pickletools.genops(pickled) if place is not None and place > 1]
    at = random.choice(places)
    kind = random.random()
    if kind < 0.75:
        what = random.choice([CALLS, BOMBS])
        said = random.choice(sorted(what))
        return f"{said} at {at}", pickled[:at] + what[said] + b"0" + pickled[at:], SAME
    end = random.choice([place for place in places if place >= at][:20])
    if kind < 0.85:
        return f"opcodes from {at} to {end} taken out", pickled[:at] + pickled[end:], FREE
    return f"opcodes from {at} to {end} twice", pickled[:end] + pickled[at:end] + pickled[end:], FREE


def bytes_of(random: Random, pickled: bytes) -> tuple[str, bytes, Expect]:
    change: Callable[[Random, bytes], tuple[str, bytes]] = random.choice(raw.CHANGES)
    said, pickled = change(random, pickled)
    return f"{said}", pickled, FREE


def names(random: Random, pickled: bytes) -> tuple[str, bytes, Expect]:
    """A character of a tensor's name, or of another text."""
    texts = [(op, value, at) for op, value, at in pickletools.genops(pickled) if op.name == "BINUNICODE"]
    _, value, at = random.choice(texts)
    other = look_alike(random, value)
    said = f"{value} renamed {other}"
    data = other.encode()
    changed = b"X" + struct.pack("<I", len(data)) + data
    return said, pickled[:at] + changed + pickled[at + 5 + len(value.encode()) :], SAME


def key_again(random: Random, pickled: bytes) -> tuple[str, bytes, Expect]:
    """At the end, one of the names gets a value a second time: a tensor's that is there, or none."""
    ops = [(op.name, value) for op, value, _ in pickletools.genops(pickled)]
    keys = [value for name, value in ops if name == "BINUNICODE" and "." in value]
    made = [ops[i + 1][1] for i in range(len(ops) - 1) if ops[i][0] == "REDUCE" and "PUT" in ops[i + 1][0]]
    value = random.choice([b"N", b"K\1", *(b"j" + struct.pack("<I", index) for index in made)])
    key = random.choice(keys)
    return f"{key} has a value again", pickled[:-1] + text(key) + value + b"s.", SAME
