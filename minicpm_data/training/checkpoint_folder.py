"""The checkpoints of a training run, for both backends: one folder per step, written atomically, with checksums.

The checksum of a file is zlib's CRC-32, which detects every change within 32 consecutive bits. It runs at 2.7 GB/s per
thread. Several threads read the files.
"""

import json
import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from minicpm_data.training.processes import SingleProcess
from weights_io.errors import InputError
from weights_io.files.partial import SUFFIX, remove

MAX_TO_KEEP = 2
SUMS = "checksums.json"
THREADS = 8
CHUNK = 1 << 22  # bytes per read


class CheckpointFolder:
    """The saved states of a run, by step. Only the latest `MAX_TO_KEEP` are kept.

    Arguments:
        folder: the run's ``checkpoints`` folder.
        processes: the run's processes. All of them call the same methods in the same order.
    """

    def __init__(self, folder: Path, processes: SingleProcess | None = None):
        self.folder = folder
        self._processes = processes or SingleProcess()
        self.latest = max(self.steps, default=0)  # 0: there is no checkpoint

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, complete or damaged, in order."""
        names = [path.name for path in self.folder.glob("*") if path.name.isdecimal() and path.name.isascii()]
        return sorted(int(name) for name in names if name == str(int(name)))

    def path(self, step: int) -> Path:
        return self.folder / str(step)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Save a checkpoint. It gets its name only when it is complete.

        Arguments:
            step: the step of the checkpoint.
            write: called in every process with a folder; it writes the state into the folder.

        Raises:
            InputError: an `OSError` occurred; earlier checkpoints are kept.
        """
        partial = self.folder / f"{step}{SUFFIX}"

        def begin() -> None:
            remove(partial)
            partial.mkdir(parents=True)

        def finish() -> None:
            (partial / SUMS).write_text(json.dumps({"step": step, "files": checksums(partial)}), encoding="utf-8")
            partial.rename(self.path(step))

        try:
            self._processes.on_main_process(begin)
            write(partial)
            self._processes.on_main_process(finish)
        except OSError as error:
            remove(partial)
            last = f"the last one, of step {self.latest}, is whole" if self.latest else "there is none yet"
            raise InputError(
                f"the checkpoint of step {step} cannot be written ({error}); {last}: make room, and --resume."
            ) from error
        self.latest = step
        self._processes.on_main_process(self._prune)

    def check(self, is_old: Callable[[Path], bool]) -> bool:
        """Check the latest checkpoint.

        Arguments:
            is_old: returns whether an earlier version, without checksums, wrote the checkpoint in a folder.

        Returns:
            Whether the checkpoint has checksums.

        Raises:
            InputError: the checkpoint is damaged. All processes raise it.
        """

        def look() -> None:
            if wrong := self.wrong(self.latest, is_old):
                raise self.damaged(wrong, is_old)
            if not (self.path(self.latest) / SUMS).exists():
                print(
                    f"note: the checkpoint of step {self.latest} was saved by an earlier version, without checksums; "
                    "damage in it may not be found",
                    file=sys.stderr,
                )

        self._processes.on_main_process(look)
        return (self.path(self.latest) / SUMS).exists()

    def wrong(self, step: int, is_old: Callable[[Path], bool]) -> str | None:
        """What is damaged in a checkpoint, in words; None where it is intact."""
        path = self.path(step)
        try:
            saved_step, files = _read_sums(path / SUMS)
        except FileNotFoundError:
            try:
                return None if is_old(path) else f"its {SUMS} is missing"
            except Exception as error:  # orbax raises bare exceptions for damaged files
                return _first_line(error)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return f"its {SUMS} is damaged"
        if saved_step != step:
            return f"it was saved as that of step {saved_step}"
        return different(path, files)

    def damaged(self, reason: str, is_old: Callable[[Path], bool]) -> InputError:
        """The error for a damaged latest checkpoint; it names the last intact one."""
        broken = [self.latest]
        for step in reversed(self.steps[:-1]):
            if self.wrong(step, is_old) is None:
                remedy = f"--resume goes on from step {step}"
                break
            broken.append(step)
        else:
            remedy = "start a new run: no checkpoint is whole"
        paths = [str(self.path(step)) for step in broken]
        named = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        return InputError(
            f"the checkpoint of step {self.latest} cannot be read ({reason}); delete {named} and {remedy}."
        )

    def _prune(self) -> None:
        for old in self.steps[:-MAX_TO_KEEP]:
            partial = self.folder / f"{old}{SUFFIX}"  # so that a half-removed folder is not a checkpoint
            self.path(old).rename(partial)
            remove(partial)


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> size in bytes and CRC-32, of all files below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        found = list(pool.map(_crc, paths))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": f"{crc:08x}"}
        for path, crc in zip(paths, found, strict=True)
    }


def different(folder: Path, files: Mapping[str, tuple[int, str]]) -> str | None:
    """The first file that differs from its saved size and CRC-32, in words; None where all are intact."""
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes and was saved with {size}"
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        found: Sequence[int | OSError] = list(pool.map(_crc_or_error, (folder / name for name in files)))
    for (name, (_, crc)), now in zip(files.items(), found, strict=True):
        if isinstance(now, OSError):
            return f"{name}: {now.strerror}"
        if f"{now:08x}" != crc:
            return f"{name} has another checksum than when it was saved"
    return None


def _read_sums(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """The step, and relative path -> (size, CRC-32 as written: a changed bit in the case of its letters counts)."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    files = {name: (int(entry["bytes"]), str(entry["crc32"])) for name, entry in saved["files"].items()}
    if not files:
        raise ValueError("no files")
    return int(saved["step"]), files


def _crc(path: Path) -> int:
    value, buffer = 0, memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
    return value


def _crc_or_error(path: Path) -> int | OSError:
    try:
        return _crc(path)
    except OSError as error:
        return error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
