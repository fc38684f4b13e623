"""Files of a model, opened as what they must be: regular ones.

A FIFO is waited for, a device such as ``/dev/zero`` never ends: neither is opened.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from weights_io.errors import InputError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a file for reading, as `open` does.

    Raises `InputError` where it cannot be read, or is a folder, a FIFO, a device or a socket.
    """
    try:
        mode = os.stat(path).st_mode
        file = open(path, "rb", buffering, opener=_not_waiting) if stat.S_ISREG(mode) else None  # noqa: SIM115
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(path, error) from error
    if file is None:
        raise _no_file(path, mode)
    if not stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode):  # it is another one by now
        file.close()
        raise _no_file(path, mode)
    return file


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a file that has at most ``most`` of them. Raises `InputError` as `open_regular` does."""
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > most else file.read(most + 1)
        except OSError as error:
            raise _unreadable(path, error) from error
    if max(size, len(data)) > most:
        raise InputError(
            f"{path} has {max(size, len(data))} bytes, and such a file has at most {most}; download it again."
        )
    return data


def _no_file(path: Path, mode: int) -> InputError:
    kind = KINDS.get(stat.S_IFMT(mode), "of another kind")
    return InputError(f"cannot read {path}: it is {kind}, not a file; put the file itself there.")


def _not_waiting(path: str, flags: int) -> int:
    """Of a FIFO that took the file's place, ``open`` alone would wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _unreadable(path: Path, error: OSError | ValueError) -> InputError:
    return InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.")
