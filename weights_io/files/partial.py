"""Files and folders that are being written: beside their target, under a name of their own, which they change for the
target's when they are whole.

The process that writes one holds a lock on it, which ends with the process however that ends. One that nobody holds was
left by a process that was killed, and is removed when the same target is written again.
"""

import contextlib
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".partial"
NUMBER = "[0-9a-f]" * 8  # of `secrets.token_hex(4)`, as a pattern
OLD = 24 * 3600  # seconds without a write, after which a file is left over where the file system has no locks


@contextlib.contextmanager
def partial(target: Path, folder: bool = False) -> Iterator[Path]:
    """A new file (or ``folder``) beside ``target``, to be written within the context. It replaces ``target`` (a folder:
    only where that is missing or empty) if the context ends without an exception, and is removed if not. What killed
    processes left of the same target is removed first. A device or a pipe is written to as it is.

    Raises:
        OSError: it cannot be made, or ``target`` cannot be replaced.
    """
    if target.exists() and not (target.is_file() or target.is_dir()):
        yield target
        return
    clear(target)
    path, held = _made(target, folder)
    try:
        yield path
        path.replace(target)
    finally:
        remove(path)  # not there any more if all went well
        os.close(held)


def write_whole(target: Path, text: str) -> None:
    """Write a UTF-8 file that is the old one or the new one and never a part. Raises `OSError`."""
    with partial(target) as path:
        path.write_text(text, encoding="utf-8")


def clear(target: Path) -> None:
    """Remove what killed processes left of ``target``."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.{NUMBER}{SUFFIX}"):
        _remove_left(path)


def clear_folder(folder: Path) -> None:
    """Remove what killed processes left of any target in ``folder``."""
    for path in folder.glob(f".*.{NUMBER}{SUFFIX}"):
        _remove_left(path)


def remove(path: Path) -> None:
    """A file or a folder, as far as it can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def try_lock(descriptor: int, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed or the process ends. Whether it was locked: False where another
    holds it, None where the file system (or Windows) has no such locks. A ``shared`` lock goes with others of its kind.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, ENOTSUP, ENOSYS; EBADF of a folder on NFS
        return None
    return True


def _made(target: Path, folder: bool) -> tuple[Path, int]:
    """A new file or folder, and the descriptor that holds it."""
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}{SUFFIX}")
        if folder:
            path.mkdir()
            held = os.open(path, os.O_RDONLY)
        else:
            held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try_lock(held, wait=True)
        if path.exists():
            return path, held
        os.close(held)  # another process took it for a leftover before it was locked


def _remove_left(path: Path) -> None:
    try:
        held = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return
    try:
        taken = try_lock(held)
        if taken or (taken is None and time.time() - _written(path) > OLD):
            remove(path)
    finally:
        os.close(held)


def _written(path: Path) -> float:
    """When something was last written in it (seconds since 1970)."""
    return max((each.lstat().st_mtime for each in (path, *path.rglob("*"))), default=0.0)
