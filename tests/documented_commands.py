"""The commands and the Python that READMEs and docs show, and how tests run them: in this process, as they stand."""

import contextlib
import io
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

from minicpm_data.cli import notebook

ROOT = Path(__file__).parent.parent
SERVER = "python -m minicpm_serve.openai_api"
PAGE = "python -m minicpm_serve.web"
SERVERS = (SERVER, PAGE, "python -m minicpm_jax.server", "python -m minicpm_mlx.server")


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


def typed(module: str, *arguments: Any, stdin: str = "") -> subprocess.CompletedProcess:
    """``python -m MODULE ARGUMENTS`` in this process, which has imported and compiled already what it needs: how it
    ends and what it says, as `subprocess.run` would tell it. An exception that would be a traceback is raised."""
    command = [module, *map(str, arguments)]
    written = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    read = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
    streams = zip(("stdout", "stderr", "stdin"), (*written, read), strict=True)
    code: int | str | None = 0
    with contextlib.ExitStack() as changed:
        for name, stream in streams:
            changed.enter_context(mock.patch.object(sys, name, stream))
        changed.enter_context(mock.patch.object(sys, "argv", command))
        changed.enter_context(mock.patch.dict(os.environ, HF_HUB_OFFLINE="1"))
        changed.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # it may be the second time
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
    said = []
    for stream in written:
        stream.flush()
        said.append(stream.buffer.getvalue().decode())
    return subprocess.CompletedProcess(command, code, *said)


def run(command, folder, monkeypatch):
    """Run ``python -m ...`` in ``folder``, with one line on its standard input. Raises `InputError` where it fails. A
    server is only started and ended."""
    if any(server in command for server in SERVERS):
        with served(command, folder) as url:
            print(url)
        return
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n"), encoding="utf-8"))
    notebook.run(command)


@contextlib.contextmanager
def served(command, folder, number=signal.SIGINT):
    """A server in a process of its own, at a port that is free, while it is needed; what it is reached by. Then a
    signal ends it, without fuss."""
    arguments = [sys.executable, *shlex.split(command)[1:], "--port", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, cwd=folder, env=environment, **pipes) as process:
        try:
            said = process.stdout.readline()
            found = re.search(r"http://\S+", said)
            assert found, process.communicate()
            yield found[0]
        finally:
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "") and "Traceback" not in err, err
