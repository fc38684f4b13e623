"""A training run's folder: what a resumed run must agree on, one run at a time, and what a killed run left there."""

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

from minicpm_data.training.processes import Alone
from weights_io.errors import InputError, listed
from weights_io.files.json_text import read_json
from weights_io.files.partial import SUFFIX, clear_folder, remove, try_lock, write_whole

SETTINGS = "settings.json"
LOCK = "run.lock"
CHECKPOINTS = "checkpoints"
NEW_MODEL = "model.new"
EXPORTS = ("adapter_model.safetensors", "model")  # what is left of a run whose checkpoints were deleted


def holds_run(folder: Path) -> bool:
    """Whether there is a run to go on with."""
    return (folder / SETTINGS).exists() and _has_checkpoints(folder)


def check_folder(folder: Path, resume: bool = False) -> bool:
    """Whether the folder holds a run to go on with; one that ended before it saved anything is none. Nothing is
    written.

    ``resume``: a run that is there is gone on with. Raises `InputError` where it is not to be, where there is none to
    ``resume``, where the folder holds something else, or where another run is using it.
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
    processes: Alone | None = None,
    former: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Hold the folder of a run, which no other run may use within the context; the first of ``processes`` locks it.

    The ``settings`` (as JSON has them) of a new run are written there, those of a run that is there are compared.
    ``former``: former name -> name, of settings that earlier versions wrote.
    ``notes`` are written beside them; of these ``base`` is compared too, and another ``valid`` only printed. What a
    killed run left half written is removed.

    Raises:
        InputError: as `check_folder`, or the settings are others.
    """
    with contextlib.ExitStack() as held:

        def begin() -> None:
            if check_folder(folder, resume):
                _compare(folder, settings, notes or {}, former or {})
            folder.mkdir(parents=True, exist_ok=True)
            sign = held.enter_context(_locked(folder))
            if begun := _is_begun(folder, resume):  # by now it may be another run
                _compare(folder, settings, notes or {}, former or {})
                _note_valid(folder, notes or {})
            _clear(folder)
            if not begun:
                if resume:
                    print(f"the run in {folder} was stopped before it saved anything; it begins anew")
                write_whole(folder / SETTINGS, json.dumps(settings | {"notes": notes or {}}, indent=1))
            sign()

        (processes or Alone()).once(begin)
        yield


def replace_model(folder: Path, write: Callable[[Path], object]) -> None:
    """Have the run's finished model written, in place of one that the run wrote before."""
    out, new = folder / "model", folder / NEW_MODEL
    remove(new)
    write(new)
    remove(out)
    new.rename(out)


def _is_begun(folder: Path, resume: bool) -> bool:
    """`check_folder`, but for other runs that are using the folder."""
    if folder.is_file():
        raise InputError(f"{folder} is a file; choose a folder.")
    if not (folder / SETTINGS).exists():
        full = folder.exists() and not all(_is_left(path) for path in folder.iterdir())
        if full or resume:
            near = _near_run(folder) if resume else None
            remedy = "choose another folder" if full else "leave out --resume to begin one"
            raise InputError(
                f"{folder} {'is not empty and ' if full else ''}holds no run to go on with; "
                + (f"did you mean {near}?" if near else f"{remedy}.")
            )
        return False
    begun = _has_checkpoints(folder)
    if begun and not resume:
        raise InputError(f"{folder} holds a run; --resume goes on with it, or choose another folder.")
    if not begun and (left := next((name for name in EXPORTS if (folder / name).exists()), None)):
        raise InputError(
            f"{folder} holds {left} of a run whose checkpoints are gone; choose another folder, or delete this one."
        )
    return begun


def _has_checkpoints(folder: Path) -> bool:
    return any(path.name.isdecimal() for path in folder.glob(f"{CHECKPOINTS}/*"))


def _clear(folder: Path) -> None:
    """Remove what a killed run left half written. Of checkpoints the run's lock says that nobody is writing them."""
    clear_folder(folder)
    remove(folder / NEW_MODEL)
    for kind in (f"*{SUFFIX}", "*.orbax-checkpoint-tmp*"):  # the second: of earlier versions
        for path in folder.glob(f"{CHECKPOINTS}/{kind}"):
            remove(path)


def _is_left(path: Path) -> bool:
    """Whether it is what a run leaves that was killed before it wrote its settings."""
    return path.name == LOCK or (path.name.startswith(f".{SETTINGS}.") and path.name.endswith(SUFFIX))


def _near_run(folder: Path) -> Path | None:
    """A run beside the folder, with a name that resembles its name."""
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
            f"{folder / SETTINGS} is damaged, so that the run cannot be gone on with; put a copy of it back, or choose "
            "another folder."
        ) from error


def _compare(folder: Path, settings: dict[str, Any], notes: dict[str, Any], former: Mapping[str, str]) -> None:
    saved = {former.get(name, name): value for name, value in _saved_settings(folder).items()}
    before = {"backend": "minicpm_jax"} | saved  # which earlier versions left out of a pretraining
    changed = [name for name in settings if before.get(name) != settings[name]]
    if _noted(before, "base") not in (None, notes.get("base")):
        changed.append("model")
    if changed:
        raise InputError(
            f"{folder} holds a run with another {listed(changed)}; choose another folder, or delete this one."
        )


def _note_valid(folder: Path, notes: dict[str, Any]) -> None:
    if _noted(_saved_settings(folder), "valid") not in (None, notes.get("valid")):
        print(
            "note: the valid examples are others than when the run began; losses on them do not compare",
            file=sys.stderr,
        )


def _noted(settings: dict[str, Any], name: str) -> Any:
    """One of a run's notes; None where it has none, as runs of earlier versions."""
    notes = settings.get("notes")
    return notes.get(name) if isinstance(notes, dict) else None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Lock the folder, until the context or the process ends; what is given writes down whose the lock is. `InputError`
    where another run has it."""
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        for pause in (0.1, 0.2, 0.4, 0):  # another command may only be looking
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
