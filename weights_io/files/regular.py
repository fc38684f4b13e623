"""Open regular files only. Opening a FIFO would block, and a device such as ``/dev/zero`` never ends."""

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
    """Open a file for reading. ``buffering``: as in `open`.

    Raises:
        InputError: it cannot be read, or is a folder, a FIFO, a device or a socket.
    """
    try:
        mode = os.stat(path).st_mode
        file = open(path, "rb", buffering, opener=_not_waiting) if stat.S_ISREG(mode) else None  # noqa: SIM115
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(path, error) from error
    if file is None:
        raise _no_file(path, mode)
    if not stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode):  # it was replaced meanwhile
        file.close()
        raise _no_file(path, mode)
    return file


def read_regular(path: Path, most: int) -> bytes:
    """Read a file of at most ``most`` bytes. Raises `InputError` for a larger one, and as `open_regular` does."""
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
    """An opener that does not block if a FIFO replaced the file meanwhile."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _unreadable(path: Path, error: OSError | ValueError) -> InputError:
    return InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.")
