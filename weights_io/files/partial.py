"""Atomic writes: files and folders are written beside their target under a temporary name, and renamed when complete.

The writing process locks the temporary file, and the lock ends with the process. An unlocked one was left by a killed
process, and is removed when the same target is written again.
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
OLD = 24 * 3600  # seconds; without locks, a temporary file that was not written for this time is removed


@contextlib.contextmanager
def partial(target: Path, folder: bool = False) -> Iterator[Path]:
    """A temporary file or folder that replaces ``target`` at the end of the context.

    After an exception it is removed instead. Leftovers of killed processes for the same target are removed first. A
    target that is a device or a pipe is written to directly.

    Arguments:
        target: the path to replace.
        folder: make a folder; ``target`` must then be missing or empty.

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
        remove(path)  # does nothing after the rename
        os.close(held)


def write_whole(target: Path, text: str) -> None:
    """Write a UTF-8 file atomically. Raises `OSError`."""
    with partial(target) as path:
        path.write_text(text, encoding="utf-8")


def clear(target: Path) -> None:
    """Remove the temporary files of killed processes for ``target``."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.{NUMBER}{SUFFIX}"):
        _remove_left(path)


def clear_folder(folder: Path) -> None:
    """Remove the temporary files of killed processes for all targets in ``folder``."""
    for path in folder.glob(f".*.{NUMBER}{SUFFIX}"):
        _remove_left(path)


def remove(path: Path) -> None:
    """Remove a file or a folder. Errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def try_lock(descriptor: int, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed or the process ends.

    Arguments:
        descriptor: of the open file or folder.
        shared: take a shared lock, which several processes may hold.
        wait: wait for the lock.

    Returns:
        True if it was locked, False if another process holds it, None if the file system (or Windows) has no locks.
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
    """A new temporary file or folder, and the descriptor that holds its lock."""
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
        os.close(held)  # another process removed it as a leftover before it was locked


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
    """The time of the last write in it, in seconds since 1970."""
    return max((each.lstat().st_mtime for each in (path, *path.rglob("*"))), default=0.0)
