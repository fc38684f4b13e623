"""The file of results, to which whole lines are appended, so that a killed run can be resumed."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from weights_io.errors import InputError, flag, short
from weights_io.files.json_text import loads
from weights_io.files.partial import try_lock, write_whole

ID = "batch_req_"  # of a result in OpenAI's format; the number of the line follows
SETTINGS = ".settings.json"  # of the file beside the results, which says what they were made of


class Results:
    """An open file of results.

    Attributes:
        done: whether each line has a result, by its number.
        before: the number of results of earlier runs.
    """

    def __init__(self, file: BinaryIO, last: int):
        self.done = bytearray(last + 1)
        self.before = 0
        self._file = file

    def write(self, number: int, result: dict[str, Any]) -> None:
        """Append the result of a line; it survives the end of this process."""
        self._file.write(json.dumps(result, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()
        self.done[number] = True

    def read(self, path: Path) -> None:
        """Find the lines that have a result, and cut off a last one that is not whole. Raises `InputError`."""
        end = 0
        with path.open("rb") as file:
            for at, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                number = _number(line)
                if not 0 < number < len(self.done) or self.done[number]:
                    wrong = f"{path}, line {at} is no result of this batch; give {{out}} a new name."
                    raise InputError(wrong, others=["out"])
                self.done[number] = True
                self.before += 1
                end += len(line)
        self._file.truncate(end)
        self._file.seek(end)


@contextlib.contextmanager
def opened(path: Path, last: int, settings: dict[str, Any]) -> Iterator[Results]:
    """The results in a file, new or of a run that was stopped.

    Arguments:
        path: the file; one with its settings stands beside it.
        last: the number of the last line of the prompts.
        settings: what decides the results, by the names of the options.

    Raises:
        InputError: the file is of something else, of other prompts or settings, or another process writes it.
    """
    beside = path.with_name(path.name + SETTINGS)
    if path.exists() and path.stat().st_size and not beside.exists():
        raise InputError(f"is {path}, which exists and was not begun by this command; give a new name.", "out")
    with path.open("ab+") as file:
        if try_lock(file.fileno()) is False:
            raise InputError(f"is {path}, which another process is writing; wait for it, or give a new name.", "out")
        if beside.exists():
            _compare(path, loads(beside.read_bytes(), str(beside)), settings)
        else:
            write_whole(beside, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        results = Results(file, last)
        results.read(path)
        yield results
        os.fsync(file.fileno())


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compare(path: Path, before: Any, now: dict[str, Any]) -> None:
    """Raises `InputError` where the results in a file were made of something else."""
    before = before if isinstance(before, dict) else {}
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    if not names:
        return
    if "prompts" in names:
        raise InputError(f"is {path}, which answers another prompts file; give a new name, or that file.", "out")
    name = names[0]
    was, wanted = (short(json.dumps(values.get(name), ensure_ascii=False)) for values in (before, now))
    raise InputError(
        f"is {path}, begun with {flag(name)} {was}, which is {wanted} now; give a new name, or that value.", "out"
    )


def _number(line: bytes) -> int:
    """The number of the line that a result is for; 0 where it tells none."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        result = json.loads(line)
        number = result["line"] if "line" in result else int(str(result.get("id")).removeprefix(ID))
        return number if isinstance(number, int) else 0
    return 0
