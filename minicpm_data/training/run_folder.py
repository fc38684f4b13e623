"""The folder of a training run: settings that a resumed run must repeat, a lock, and the cleanup after a killed run."""

import contextlib
import difflib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minicpm_data.training.processes import SingleProcess
from weights_io.errors import InputError, listed
from weights_io.files.json_text import read_json
from weights_io.files.partial import SUFFIX, clear_folder, remove, try_lock, write_whole

SETTINGS = "settings.json"
LOCK = "run.lock"
CHECKPOINTS = "checkpoints"
NEW_MODEL = "model.new"
EXPORTS = ("adapter_model.safetensors", "model")  # results that remain if a run's checkpoints were deleted


def holds_run(folder: Path) -> bool:
    """Whether the folder holds a run that can be resumed."""
    return (folder / SETTINGS).exists() and _has_checkpoints(folder)


def check_folder(folder: Path, resume: bool = False) -> bool:
    """Check that a run may use the folder. Nothing is written.

    Arguments:
        folder: the run's folder.
        resume: whether the user wants to resume a run.

    Returns:
        Whether the folder holds a run with a checkpoint.

    Raises:
        InputError: the folder holds a run and ``resume`` is False, holds no run to resume, holds other files, or is in
            use by another run.
    """
    begun = _is_begun(folder, resume)
    with contextlib.suppress(FileNotFoundError), (folder / LOCK).open("rb") as file:
        if try_lock(file.fileno(), shared=True) is False:
            raise _in_use(folder)
    return begun


@contextlib.contextmanager
def using(
    folder: Path,
    settings: dict[str, Any],
    resume: bool = False,
    notes: dict[str, Any] | None = None,
    processes: SingleProcess | None = None,
    former: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Lock the folder of a run within the context, and remove the partial files of a killed run.

    Arguments:
        folder: the run's folder; it is made if it is missing.
        settings: JSON values. A new run stores them; a resumed run must have the same ones.
        resume: as in `check_folder`.
        notes: stored with the settings. A resumed run must have the same ``base``. If its ``valid`` differs, a note is
            printed.
        processes: the run's processes; process 0 takes the lock.
        former: former name -> name of settings that earlier versions stored.

    Raises:
        InputError: as `check_folder`, or the settings differ.
    """
    with contextlib.ExitStack() as held:

        def begin() -> None:
            if check_folder(folder, resume):
                _compare(folder, settings, notes or {}, former or {})
            folder.mkdir(parents=True, exist_ok=True)
            sign = held.enter_context(_locked(folder))
            if begun := _is_begun(folder, resume):  # another run may have started meanwhile
                _compare(folder, settings, notes or {}, former or {})
                _note_valid(folder, notes or {})
            _clear(folder)
            if not begun:
                if resume:
                    print(f"the run in {folder} was stopped before its first checkpoint; it starts again")
                write_whole(folder / SETTINGS, json.dumps(settings | {"notes": notes or {}}, indent=1))
            sign()

        (processes or SingleProcess()).on_main_process(begin)
        yield


def replace_model(folder: Path, write: Callable[[Path], object]) -> None:
    """Replace the finished model of a run.

    Arguments:
        folder: the run's folder.
        write: called with a new folder; it writes the model into the folder.
    """
    out, new = folder / "model", folder / NEW_MODEL
    remove(new)
    write(new)
    remove(out)
    new.rename(out)


def _is_begun(folder: Path, resume: bool) -> bool:
    """`check_folder` without the check of the lock."""
    if folder.is_file():
        raise InputError(f"{folder} is a file; choose a folder.")
    if not (folder / SETTINGS).exists():
        full = folder.exists() and not all(_is_left(path) for path in folder.iterdir())
        if full or resume:
            near = _near_run(folder) if resume else None
            remedy = "choose another folder" if full else "leave out --resume to begin one"
            raise InputError(
                f"{folder} {'is not empty and ' if full else ''}holds no run to resume; "
                + (f"did you mean {near}?" if near else f"{remedy}.")
            )
        return False
    begun = _has_checkpoints(folder)
    if begun and not resume:
        raise InputError(f"{folder} holds a run; add --resume to continue it, or choose another folder.")
    if not begun and (left := next((name for name in EXPORTS if (folder / name).exists()), None)):
        raise InputError(
            f"{folder} holds {left} of a run without checkpoints; choose another folder, or delete this one."
        )
    return begun


def _has_checkpoints(folder: Path) -> bool:
    return any(path.name.isdecimal() for path in folder.glob(f"{CHECKPOINTS}/*"))


def _clear(folder: Path) -> None:
    """Remove the partial files of a killed run. The caller holds the lock, so no run is writing them."""
    clear_folder(folder)
    remove(folder / NEW_MODEL)
    for kind in (f"*{SUFFIX}", "*.orbax-checkpoint-tmp*"):  # earlier versions left the second kind
        for path in folder.glob(f"{CHECKPOINTS}/{kind}"):
            remove(path)


def _is_left(path: Path) -> bool:
    """Whether a file remains from a run that was killed before it wrote its settings."""
    return path.name == LOCK or (path.name.startswith(f".{SETTINGS}.") and path.name.endswith(SUFFIX))


def _near_run(folder: Path) -> Path | None:
    """A run in the same parent folder with a similar name."""
    folder = folder.absolute()
    try:
        names = [
            path.name for path in folder.parent.iterdir() if (path / SETTINGS).is_file() and _has_checkpoints(path)
        ]
    except OSError:
        return None
    near = difflib.get_close_matches(folder.name, names, 1)
    return folder.parent / near[0] if near else None


def _saved_settings(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / SETTINGS)
    except InputError as error:
        raise InputError(
            f"{folder / SETTINGS} is damaged, and the run cannot be resumed; restore a copy of the file, or choose "
            "another folder."
        ) from error


def _compare(folder: Path, settings: dict[str, Any], notes: dict[str, Any], former: Mapping[str, str]) -> None:
    saved = {former.get(name, name): value for name, value in _saved_settings(folder).items()}
    before = {"backend": "minicpm_jax"} | saved  # earlier versions stored no backend in pretraining
    changed = [name for name in settings if before.get(name) != settings[name]]
    if _noted(before, "base") not in (None, notes.get("base")):
        changed.append("model")
    if changed:
        raise InputError(
            f"{folder} holds a run with another {listed(f'{{{name}}}' for name in changed)}; choose another folder, or "
            "delete this one.",
            others=changed,
        )


def _note_valid(folder: Path, notes: dict[str, Any]) -> None:
    if _noted(_saved_settings(folder), "valid") not in (None, notes.get("valid")):
        print(
            "note: the validation examples differ from those at the start of the run; their losses do not compare",
            file=sys.stderr,
        )


def _noted(settings: dict[str, Any], name: str) -> Any:
    """A note of a run; None if it is missing, as in runs of earlier versions."""
    notes = settings.get("notes")
    return notes.get(name) if isinstance(notes, dict) else None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Lock the folder until the context or the process ends. Raises `InputError` where another run holds the lock.

    Yields a function that writes the owner's name into the lock file.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        for pause in (0.1, 0.2, 0.4, 0):  # another command may only be checking
            taken = try_lock(file.fileno())
            if taken is not False:
                break
            time.sleep(pause)
        else:
            raise _in_use(folder)
        if taken is None:
            print(
                f"note: the file system of {folder} has no locks; start no second run in this folder", file=sys.stderr
            )

        def sign() -> None:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()

        yield sign


def _in_use(folder: Path) -> InputError:
    try:
        who = (folder / LOCK).read_text(encoding="utf-8")[:80]
    except (OSError, ValueError):
        who = ""
    named = f" ({who})" if who and who.isprintable() else ""
    return InputError(
        f"{folder} is in use by another run{named}; wait until it ends, stop it, or choose another folder."
    )
