"""Mutators of the arrays in an ``.npz`` file: their headers are Python expressions, their data may be pickles."""

import io
import pickle
import struct
from random import Random
from typing import Any

import numpy as np

from fuzzing.archives import SHELL, Entries, added, read, write
from fuzzing.mutant import FREE, SAME, Expect, Mutator, changed

DTYPES = [
    "|O",
    ">f4",
    "<f8",
    "<f2",
    "<i8",
    "|b1",
    "<U100",
    "|V0",
    "<c16",
    "<M8[s]",
    "[('a','<f4')]",
    "x",
    "<f4, <f4",
    "|S9999999999",
]
SHAPES = [
    "()",
    "(0,)",
    "(1,)",
    "(-1,)",
    "(2**31,)",
    "(1099511627776,)",
    "(4611686018427387904, 4)",
    "(1,)*65",
    "(1.5,)",
    "1",
]
SHAPES += ["(True,)", "(" + "1," * 100 + ")", "(999999999, 0)", "(2147483648, 2)"]


class Trap:
    def __reduce__(self) -> Any:
        import os

        return os.system, (SHELL,)


def npz_of(name: str) -> Mutator:
    return changed(name, header, header, values, values, other_entry)


def _entry(random: Random, data: bytes) -> tuple[Entries, int]:
    entries = read(data)
    return entries, random.randrange(len(entries))


def header(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    entries, at = _entry(random, data)
    info, content = entries[at]
    length = struct.unpack("<H", content[8:10])[0]
    shown, rest = content[10 : 10 + length].decode(), content[10 + length :]
    array = np.lib.format.read_array(io.BytesIO(content))
    kind = random.choice(["dtype", "shape", "order", "version", "length", "text", "nested"])
    fields = {"descr": repr(array.dtype.str), "fortran_order": "False", "shape": repr(array.shape)}
    version, size = b"\1\0", None
    if kind == "dtype":
        chosen = random.choice(DTYPES)
        fields["descr"] = chosen if chosen.startswith("[") else repr(chosen)
    elif kind == "shape":
        fields["shape"] = random.choice([*SHAPES, repr(array.shape[::-1])])
    elif kind == "order":
        fields["fortran_order"] = random.choice(["True", "1", "None", "'x'"])
    elif kind == "version":
        version = random.choice([b"\2\0", b"\3\0", b"\xff\xff", b"\0\0"])
    elif kind == "length":
        size = random.choice([0, 1, 65535, length + 1, length - 1])
    shown = "{" + ", ".join(f"'{name}': {value}" for name, value in fields.items()) + ", }"
    if kind == "text":
        shown = random.choice(
            ["", "{}", "[]", "1", "__import__('os').system('" + SHELL + "')", shown + " + 1", "\0" * 50, "{**{}}"]
        )
    elif kind == "nested":
        shown = random.choice(["(" * 5000, "[" * 5000 + "]" * 5000, "-" * 9000 + "1", "{1:" * 3000, "9" * 9000])
    text = shown.encode()[:65_000] + b"\n"
    entries[at] = info, b"\x93NUMPY" + version + struct.pack("<H", len(text) if size is None else size) + text + rest
    # Other places of the same numbers (Fortran's order, a type of the same width) are another array.
    return f"{info.filename}: {kind} {shown[:60]}", write(entries), FREE


def values(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    entries, at = _entry(random, data)
    info, content = entries[at]
    array = np.lib.format.read_array(io.BytesIO(content))
    flat = array.reshape(-1).copy()
    if flat.size:
        number = (
            random.choice([np.nan, np.inf, -1, 2**31, 1e30, 0])
            if flat.dtype.kind == "f"
            else random.choice([-1, 2**30, -(2**31), 999_999])
        )
        with np.errstate(all="ignore"):
            flat[random.randrange(flat.size)] = np.array(number).astype(flat.dtype)
    chosen = random.choice(
        [flat.reshape(array.shape), array[None], array[:0] if array.ndim else flat, array.T, array.astype(np.float16)]
    )
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(chosen))
    entries[at] = info, file.getvalue()
    return f"{info.filename}: other values or shape", write(entries), FREE


def other_entry(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    """An object that runs something when it is unpickled, or what is no array."""
    entries, at = _entry(random, data)
    info, _ = entries[at]
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([Trap()], object), allow_pickle=True)
    contents = {
        "a trap": file.getvalue(),
        "a pickle": pickle.dumps(Trap()),
        "nothing": b"",
        "zeros": b"\0" * 100,
        "text": b"x" * 50,
    }
    said = random.choice(sorted(contents))
    if random.random() < 0.5:
        entries[at] = info, contents[said]
    else:
        entries.append(added(random.choice(["zq.npy", "zq", "logits_zq.npy", "input_ids_zq.npy"]), contents[said]))
    return f"{info.filename}: {said}", write(entries), SAME
