"""The commands and the Python that READMEs and docs show, and how tests run them: in this process, as they stand."""

import io
import re
import sys
from pathlib import Path

from minicpm_data import notebook

ROOT = Path(__file__).parent.parent


def blocks(page, language):
    """What stands between its fences."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def commands(page):
    """In order: of the blocks, and of tables whose cells are commands."""
    found = re.findall(
        r"^(?:echo .* \| )?(python -m .*)$|^\|.*\| `(python -m [^`]*)` \|$",
        (ROOT / page).read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return [line or cell for line, cell in found]


def run(command, folder, monkeypatch):
    """Run ``python -m ...`` in ``folder``, with one line on its standard input. Raises `InputError` where it fails."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n"), encoding="utf-8"))
    notebook.run(command)
