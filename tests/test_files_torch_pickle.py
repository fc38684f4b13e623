"""Torch files: read without torch, and without running what they ask for."""

import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from weights_io.errors import InputError
from weights_io.files import torch_pickle

# A few pickle opcodes, enough to write what torch.save writes (protocol 2) and what it never would.


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def whole(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def several(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def wholes(values) -> bytes:
    return several(*map(whole, values))


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + several(*arguments) + b"R"


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def program(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


NONE, FALSE, TRUE = b"N", b"\x89", b"\x88"
DOUBLED = b"h\x00h\x00\x86q\x000"  # memo 0 becomes a pair of itself
COPIED = name("collections", "OrderedDict") + b"h\x00\x85R0"  # of the list in memo 0
PAIRS = b"".join(several(text(f"{i}"), NONE) for i in range(1000))
ORDERED = call(name("collections", "OrderedDict"))


def storage(kind: str = "FloatStorage", key: str = "0", count: int = 6, module: str = "torch") -> bytes:
    return several(text("storage"), name(module, kind), text(key), text("cpu"), whole(count)) + b"Q"


def tensor(stored: bytes, offset: int = 0, shape=(2, 3), strides=(3, 1), *more: bytes, version: int = 2) -> bytes:
    function = name("torch._utils", f"_rebuild_tensor_v{version}")
    return call(function, stored, whole(offset), wholes(shape), wholes(strides), FALSE, ORDERED, *more)


def archive(path: Path, pickled: bytes, storages=None, compression=zipfile.ZIP_STORED, **entries: bytes) -> Path:
    if storages is None:
        storages = {"0": np.arange(6, dtype=np.float32)}
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for entry, data in entries.items():
            file.writestr(f"archive/{entry}", data)
        for key, array in storages.items():
            file.writestr(f"archive/data/{key}", array.tobytes())
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        torch_pickle.open_file(path)
    assert "\n" not in str(caught.value)


def test_reference_file_holds_the_same_as_its_safetensors_twin(reference):
    from weights_io.files.folder import open_folder

    torch_file, twin = torch_pickle.open_file(reference("bin") / "pytorch_model.bin"), open_folder(reference("sharded"))
    assert torch_file.keys() - {"lm_head.weight"} == twin.keys()
    for key, expected in twin.items():
        np.testing.assert_array_equal(torch_file[key].read(), expected.read(), err_msg=key)
    np.testing.assert_array_equal(torch_file["lm_head.weight"].read(), twin["model.embed_tokens.weight"].read())
    transposed = "model.layers.2.mlp.down_proj.weight"
    assert torch_file[transposed].strides[0] == 1
    part = (slice(3, 9), slice(5, 40))
    np.testing.assert_array_equal(torch_file[transposed].read(part), twin[transposed].read(part))


def test_every_storage_class_and_view(path):
    kinds = torch_pickle.STORAGES.items()
    arrays = {kind: np.arange(6).astype(dtype) for kind, dtype in kinds}
    entries = {kind: tensor(storage(kind, kind)) for kind in arrays}
    entries["tail"] = tensor(storage("LongStorage", "LongStorage"), 2, (2, 2), (2, 1))
    entries["transposed"] = tensor(storage("HalfStorage", "HalfStorage"), 0, (3, 2), (1, 3))
    entries["scalar"] = tensor(storage("FloatStorage", "FloatStorage"), 5, (), ())
    entries["expanded"] = tensor(storage("FloatStorage", "FloatStorage"), 1, (4, 2), (0, 1))
    entries["empty"] = tensor(storage("FloatStorage", "FloatStorage"), 6, (0, 3), (3, 1))
    entries["one"] = tensor(storage("FloatStorage", "FloatStorage"), 1, (1, 1), (2**60, 2**60))
    parameter = name("torch._utils", "_rebuild_parameter")
    entries["parameter"] = call(parameter, tensor(storage("FloatStorage", "FloatStorage")), TRUE, ORDERED)
    found = torch_pickle.open_file(archive(path, program(mapping(**entries)), arrays, byteorder=b"little"))
    for kind, array in arrays.items():
        assert found[kind].dtype == array.dtype
        np.testing.assert_array_equal(found[kind].read(), array.reshape(2, 3))
    assert found["BFloat16Storage"].dtype == ml_dtypes.bfloat16
    assert found["tail"].read().tolist() == [[2, 3], [4, 5]]
    assert found["transposed"].read((slice(1, 3),)).tolist() == [[1, 4], [2, 5]]
    assert found["scalar"].read().tolist() == 5 and found["one"].read().tolist() == [[1]]
    assert found["expanded"].read().tolist() == [[1, 2]] * 4
    assert found["empty"].read().shape == (0, 3)
    assert found["parameter"].read().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_untyped_storage_takes_the_dtype_of_the_tensor(path):
    eight = np.arange(6).astype(ml_dtypes.float8_e4m3fn)
    stored = storage("UntypedStorage", module="torch.storage")
    with_dtype = tensor(stored, 0, (2, 3), (3, 1), name("torch", "float8_e4m3fn"), version=3)
    found = torch_pickle.open_file(archive(path, program(mapping(w=with_dtype)), {"0": eight}))
    np.testing.assert_array_equal(found["w"].read(), eight.reshape(2, 3))
    refused(archive(path, program(mapping(w=tensor(stored))), {"0": eight}), "w in .* without a dtype")


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_state_dict_within_a_dict_is_found(path, key):
    inner = ORDERED + b"(" + text("w") + tensor(storage()) + b"u" + mapping(_metadata=mapping(version=whole(1))) + b"b"
    outer = {key: inner, "epoch": whole(3), "optimizer": mapping(lr=whole(1))}
    assert torch_pickle.open_file(archive(path, program(mapping(**outer)))).keys() == {"w"}


MALICIOUS = ["os system", "posix system", "builtins eval", "subprocess Popen", "torch load", "torch.hub load"]


@pytest.mark.parametrize("target", MALICIOUS)
@pytest.mark.parametrize("form", ["call", "stack", "inst", "nested"])
def test_nothing_is_run(path, tmp_path, target, form):
    marker = tmp_path / "ran"
    module, attribute = target.split()
    command = text(f"touch {marker}")
    attack = {
        "call": call(name(module, attribute), command),
        "stack": b"\x8c" + bytes([len(module)]) + module.encode() + text(attribute) + b"\x93" + several(command) + b"R",
        "inst": b"(" + command + f"i{module}\n{attribute}\n".encode(),
        "nested": call(name("collections", "OrderedDict"), call(name(module, attribute), command)),
    }[form]
    refused(archive(path, program(mapping(w=tensor(storage()), x=attack))), f"would run {module}.{attribute}")
    assert not marker.exists()


def test_attributes_cannot_be_set(path, tmp_path):
    """BUILD on what the pickle made: neither a tensor's file nor the reader's functions can be swapped."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 24)
    change = mapping(source=text(str(secret)), storage=text("x"), dtype=NONE, offset=whole(0))
    for state in (change, several(NONE, change)):
        refused(archive(path, program(mapping(w=tensor(storage()) + state + b"b"))), "damaged|no storage")
    function = name("torch._utils", "_rebuild_tensor_v2") + several(NONE, mapping(__defaults__=several(TRUE))) + b"b"
    refused(archive(path, program(mapping(w=function))), "sets attributes")
    good = archive(path, program(mapping(w=tensor(storage()))))
    assert torch_pickle.open_file(good)["w"].read().tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "value, message",
    [
        (whole(1), "holds a int"),
        (mapping(w=tensor(storage()), step=whole(1)), "step in .* is not a tensor"),
        (mapping(w=tensor(storage()), model=mapping(v=tensor(storage()))), "model in .* is not a tensor"),
        (b"}(" + whole(1) + tensor(storage()) + b"u", "a key that is a int"),
        (mapping(w=tensor(storage(key="7"))), "w in .* has no storage"),
        (mapping(w=tensor(NONE)), "w in .* has no storage"),
        (mapping(w=tensor(storage(count=7))), "expects a storage of 7 elements and finds 24 bytes"),
        (mapping(w=tensor(storage("DoubleStorage"))), "expects a storage of 6 elements and finds 24 bytes"),
        (mapping(w=tensor(storage(count=-1))), "no tensor storage"),
        (mapping(w=whole(1) + b"Q"), "no tensor storage"),
        (mapping(w=tensor(storage(), 1)), "goes beyond its storage"),
        (mapping(w=tensor(storage(), 0, (3, 3))), "goes beyond its storage"),
        (mapping(w=tensor(storage(), 0, (2**40, 2**40), (0, 0))), "goes beyond its storage"),
        (mapping(w=tensor(storage(), 0, (2**70,), (1,))), "not whole numbers"),
        (mapping(w=tensor(storage(), -1)), "not whole numbers"),
        (mapping(w=tensor(storage(), 3, (2, 3), (-3, 1))), "not whole numbers"),
        (mapping(w=tensor(storage(), 0, (-2, 3))), "not whole numbers"),
        (mapping(w=tensor(storage(), 0, (6,), (1, 1))), "not whole numbers"),
        (mapping(w=tensor(storage(), 0, (1,) * 65, (1,) * 65)), "65 dimensions"),
        (mapping(w=tensor(storage(), 0, (2, 3), (3, 1), mapping(neg=TRUE))), "negative bits"),
        (mapping(w=call(name("torch._utils", "_rebuild_tensor_v2"))), "damaged"),
        (mapping(w=b"\x96" + struct.pack("<Q", 2**62)), "damaged"),
        (b"(" * 50, "damaged"),
        (b"}" + NONE + b"\x85" * 200_000 + NONE + b"s", "a key that is a tuple"),  # hashing overflows the stack
        (b"})q\x000" + DOUBLED * 60 + b"h\x00" + NONE + b"s", "a key that is a tuple"),  # hashing it takes 2**60 steps
        (b"Nr" + struct.pack("<I", 2**31) + b"0}", "its number 2147483648 after 3 opcodes"),  # 17 GB in Python's
        (b"})q\x000" + DOUBLED * 60 + b"h\x00" + text("x") + b"\x93s", "names what is no function"),  # so does its text
        (b"}(" + whole(2**61 - 1) + NONE + b"u", "a number beyond all use"),  # any number of ints hash to 0
        (b"}(" + b"G\x3f\xf8" + bytes(6) + NONE + b"u", "a key that is a float"),
        (b"N" * 1_000_001, "more than 1000000 parts"),
        (mapping(w=b"\x8b" + struct.pack("<i", 2**31 - 1)), "damaged"),
        (mapping(w=b"\x8b" + struct.pack("<i", 3) + b"abc"), "opcode LONG4"),
        (mapping(w=b"\x8f"), "opcode EMPTY_SET"),
        (mapping(w=b"\x82\x01"), "opcode EXT1"),
        (mapping(w=call(name("collections", "OrderedDict"), whole(1))), "an OrderedDict of what is no list"),
        (b"]q\x00(" + PAIRS + b"e0}" + COPIED * 1000, "more than 1000000 parts"),
        (b"}" + (text("w") + NONE + b"s") * 2, "it has the key w twice"),
        (b"a", "takes more than it has made"),
        (b"h\x07", "damaged"),
        (NONE + several(NONE) + b"R", "calls what is no function"),
    ],
)
def test_what_is_no_state_dict_of_tensors_is_refused(path, value, message):
    refused(archive(path, program(value)), message)


def test_other_archives_are_refused(path):
    good = program(mapping(w=tensor(storage())))
    refused(archive(path, good, compression=zipfile.ZIP_DEFLATED), "compressed")
    refused(archive(path, good, byteorder=b"big"), "not little-endian")
    refused(archive(path, good, **{"constants.pkl": b"", "code/__torch__.py": b""}), "TorchScript")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", "{}")
    refused(path, "not one of torch.save")
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    refused(path, "before 1.6.*save it again")
    path.write_bytes(b"<html>")
    refused(path, "no torch file")
    path.unlink()
    refused(path, "cannot read")


def test_two_entries_of_one_name_are_refused(path):
    """The last one wins in zipfile, the first in others."""
    archive(path, program(mapping(w=tensor(storage()))))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/0", bytes(24))
    refused(path, "two entries archive/data/0")


def test_an_entry_must_be_the_one_that_the_directory_names(path):
    two = {"0": np.arange(6, dtype=np.float32), "1": np.ones(6, np.float32)}
    data = archive(path, program(mapping(w=tensor(storage()))), two).read_bytes()
    offset = struct.pack("<I", data.index(b"archive/data/0") - 30)
    assert data.count(offset) == 1
    path.write_bytes(data.replace(offset, struct.pack("<I", data.index(b"archive/data/1") - 30)))
    refused(path, "no local header for archive/data/0")


def test_entries_that_overlap_are_refused(path):
    """Else a short file holds any number of bytes to work checksums out of."""
    data = archive(path, program(mapping()), {}, outer=b"(local header of the inner entry, and its bytes)").read_bytes()
    directory = data.index(b"PK\x01\x02")
    entry = data[data.index(b"PK\x01\x02", directory + 4) : data.rindex(b"PK\x05\x06")]
    begin, size = data.index(b"PK\x03\x04", 4), 20  # of the outer entry, and bytes of the inner one
    header = data[begin : begin + 30 + len("archive/outer")].replace(b"outer", b"inner")
    start = begin + len(header)
    outer = header.replace(b"inner", b"outer") + header + data[start : start + size]
    sizes = struct.pack("<II", len(header) + size, len(header) + size)
    inner = entry.replace(b"outer", b"inner")
    inner = inner[:20] + struct.pack("<II", size, size) + inner[28:42] + struct.pack("<I", start) + inner[46:]
    entry = entry[:20] + sizes + entry[28:]
    listed = data[directory : data.index(b"PK\x01\x02", directory + 4)] + entry + inner
    body = data[:begin] + outer
    end = struct.pack("<4s4xHHIIH", b"PK\x05\x06", 3, 3, len(listed), len(body), 0)
    path.write_bytes(body + listed + end)
    refused(path, "archive/inner in .* overlaps another entry")


def test_a_flipped_bit_is_found_by_its_checksum(path):
    pickled = program(mapping(w=tensor(storage())))
    data = archive(path, pickled, version=b"3").read_bytes()
    numbers = np.arange(6, dtype=np.float32).tobytes()
    spoiled = data.replace(numbers, numbers[:-1] + b"\x41")
    path.write_bytes(spoiled)
    opened = torch_pickle.open_file(path)["w"]
    for read in (opened.read, lambda: opened.read_rows(0, np.empty((2, 3), np.float32))):
        with pytest.raises(InputError, match="archive/data/0 in .* has a wrong checksum"):
            read()
    path.write_bytes(data.replace(pickled, pickled.replace(b"X\x01\x00\x00\x00w", b"X\x01\x00\x00\x00v")))
    refused(path, "archive/data.pkl in .* has a wrong checksum")
    with zipfile.ZipFile(path) as file:
        sums = [struct.pack("<I", info.CRC) for info in file.infolist()]
    for known in sums:
        spoiled = spoiled.replace(known, bytes(4))  # as where torch is told to work none out
    path.write_bytes(spoiled)
    assert torch_pickle.open_file(path)["w"].read()[-1, -1] != 5


def test_a_directory_without_end_is_not_read(path):
    data = archive(path, program(mapping())).read_bytes()
    end = data.rindex(b"PK\x05\x06")
    path.write_bytes(
        data[:end] + bytes(5_000_000) + data[end : end + 12] + struct.pack("<I", 5_000_000) + data[end + 16 :]
    )
    refused(path, "a directory of 5000000 bytes is more than any model needs")


def test_numbers_repeated_without_end_are_refused(path):
    refused(archive(path, program(mapping(w=tensor(storage(), 0, (2**22, 2), (0, 1))))), "repeats the numbers")


def test_every_truncation_is_refused(path):
    data = archive(path, program(mapping(w=tensor(storage())))).read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            torch_pickle.open_file(path)


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_no_flipped_byte_gives_another_error(path, flip):
    """Of the archive, and of the pickle behind a right checksum."""
    pickled = program(mapping(w=tensor(storage(), 0, (2, 3), (3, 1))))
    data = archive(path, pickled).read_bytes()

    def mutants(original: bytes):
        for i in range(len(original)):
            yield original[:i] + bytes([original[i] ^ flip]) + original[i + 1 :]

    outcomes = {"refused": 0, "read": 0}
    for k, mutant in enumerate([*mutants(data), *mutants(pickled)]):
        if k < len(data):
            path.write_bytes(mutant)
        else:
            archive(path, mutant)
        try:
            for value in torch_pickle.open_file(path).values():
                value.read()
            outcomes["read"] += 1
        except InputError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0
