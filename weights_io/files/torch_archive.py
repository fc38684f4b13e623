"""Read the zip archive of ``torch.save``: ``NAME/data.pkl``, and each storage uncompressed as ``NAME/data/KEY``.

Nothing is decompressed, and every entry must be completely within the file. torch writes a checksum for each entry
(unless it is disabled) and never verifies it; here a storage is verified when it is first read.
"""

import os
import struct
import threading
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from weights_io.errors import InputError, short
from weights_io.files.regular import open_regular
from weights_io.files.tensor import FileTensor

MAX_PICKLE = 10_000_000  # bytes; that of a model of 10 000 tensors has 2 million
MAX_DIRECTORY = 4_000_000  # bytes; an entry has about 80
PIECE = 1 << 20  # bytes
DAMAGED = (zipfile.BadZipFile, RuntimeError, ValueError, ArithmeticError, OSError, EOFError, struct.error)


@dataclass
class Stored:
    """An entry of the archive."""

    path: Path
    name: str
    offset: int  # bytes in the file
    size: int
    checksum: int | None  # None: verified already, or not stored
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def check(self) -> None:
        """Verify the checksum, once. Raises `InputError` where it is wrong."""
        if self.checksum is None:
            return
        with self._lock:
            if self.checksum is not None and self.checksum != _checksum(self):
                raise InputError(f"{short(self.name)} in {self.path} has a wrong checksum; download the file again.")
            self.checksum = None


@dataclass(frozen=True)
class StoredTensor(FileTensor):
    storage: Stored

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        self.storage.check()
        return super().read(index)

    def read_rows(self, start: int, rows: np.ndarray) -> bool:
        self.storage.check()
        return super().read_rows(start, rows)


def read_archive(path: Path) -> tuple[bytes, dict[str, Stored]]:
    """The pickle, and the storages by key. Raises `InputError` for a damaged archive."""
    with open_regular(path) as file:
        _check_magic(path, file.read(4))
        try:
            size = os.fstat(file.fileno()).st_size
            infos = zipfile.ZipFile(_Limited(file, size)).infolist()  # type: ignore[arg-type]
            root = _root(path, [info.filename for info in infos])
            entries = _entries(path, file, size, infos)
            pickle = entries[root + "data.pkl"]
            if pickle.size > MAX_PICKLE:
                raise InputError(f"{path} has a pickle of more than {MAX_PICKLE} bytes, more than any model needs.")
            if root + "byteorder" in entries and _bytes(file, entries[root + "byteorder"]) != b"little":
                raise InputError(f"{path} is not little-endian; save it again on a little-endian machine.")
        except InputError:
            raise
        except DAMAGED as error:
            raise InputError(f"{path} is truncated or damaged ({error}); download it again.") from error
        storages = {name.removeprefix(root + "data/"): each for name, each in entries.items()}
        storages = {key: each for key, each in storages.items() if each.name != key}
        others = [each for each in entries.values() if each.size and not each.name.startswith(root + "data/")]
        if not any(each.checksum == _checksum(each) for each in others if each.size <= MAX_PICKLE):
            for each in entries.values():
                each.checksum = None  # torch was told to work none out
        pickle.check()
        return _bytes(file, pickle), storages


def _check_magic(path: Path, magic: bytes) -> None:
    if magic[:1] == b"\x80":
        raise InputError(
            f"{path} has the format of torch before 1.6, which is not read here; load it with torch and save it again, "
            "or convert it to safetensors."
        )
    if magic != b"PK\x03\x04":
        raise InputError(f"{path} is no torch file (a torch file is a zip archive); download it again.")


def _entries(path: Path, file: BinaryIO, size: int, infos: list[zipfile.ZipInfo]) -> dict[str, Stored]:
    """Every entry by its name. ``size``: of the file."""
    if twice := [name for name, count in Counter(info.filename for info in infos).items() if count > 1]:
        raise InputError(f"{path} has two entries {short(twice[0])}, which may differ; save it again with torch.save.")
    entries = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise InputError(
                f"{short(info.filename)} in {path} is compressed or encrypted; save it again with torch.save."
            )
        offset = _data_offset(file, info)
        if offset + info.file_size > size:
            raise InputError(f"{short(info.filename)} in {path} goes beyond the end of the file; download it again.")
        entries[info.filename] = Stored(path, info.filename, offset, info.file_size, info.CRC)
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.offset):
        if entry.offset < end:  # a short file could hold any length in all
            raise InputError(f"{short(entry.name)} in {path} overlaps another entry; save it again with torch.save.")
        end = entry.offset + entry.size
    return entries


def _root(path: Path, names: list[str]) -> str:
    """``NAME/``."""
    roots = [name.removesuffix("data.pkl") for name in dict.fromkeys(names) if name.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise InputError(f"{path} is a zip archive but not one of torch.save (no NAME/data.pkl); convert it.")
    root = roots[0]
    if root + "constants.pkl" in names or any(name.startswith(root + "code/") for name in names):
        raise InputError(f"{path} is a TorchScript archive, i.e. a program; save the model's state_dict instead.")
    return root


def _bytes(file: BinaryIO, entry: Stored) -> bytes:
    file.seek(entry.offset)
    return file.read(entry.size)


def _checksum(entry: Stored) -> int:
    total, left = 0, entry.size
    with open_regular(entry.path) as file:
        file.seek(entry.offset)
        while left and (piece := file.read(min(left, PIECE))):
            total, left = zlib.crc32(piece, total), left - len(piece)
    return total


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes start: behind its local header, whose extra field has a length of its own."""
    file.seek(info.header_offset)
    signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
    own = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    if signature != b"PK\x03\x04" or file.read(name) != own:
        raise zipfile.BadZipFile(f"no local header for {short(info.filename)}")
    return info.header_offset + 30 + name + extra


class _Limited:
    """The file as `zipfile` sees it, which would read a directory of any length into memory."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        count = self.size - self.file.tell() if count < 0 else count
        if count > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"a directory of {count} bytes is more than any model needs")
        return self.file.read(count)
