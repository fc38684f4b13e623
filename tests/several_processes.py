"""Runs of one command in several processes of two devices each, as several hosts would have them."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

DEVICES = 2
END = "that was the command that ends with"
IN_TURN = f"""
import json, runpy, sys
*flags, commands = sys.argv[1:]
for command in json.loads(commands):
    sys.argv, code = [*command, *flags], 0
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    for stream in (sys.stdout, sys.stderr):
        print("{END}", code, file=stream, flush=True)
sys.exit(code)
"""


def environment(devices: int) -> dict[str, str]:
    """That of this process, with so many devices."""
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    return os.environ | {"XLA_FLAGS": flags}


def start(*command: Any, more: Sequence[Sequence[str]] = ((), ()), mpi: bool = False) -> list[subprocess.Popen]:
    """``python COMMAND`` in two processes, with the flags that make them one run, and ``more`` of each. ``mpi``: they
    find each other by what Open MPI would have set."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = []
    for number in range(2):
        flags: list[Any] = ["--distributed"]
        given = environment(DEVICES)
        if mpi:  # JAX makes a port of 61440 to 65535 of the job's number
            given["OMPI_MCA_orte_hnp_uri"] = f"{port % 4096 * 4096}.0;tcp://127.0.0.1:{port}"
            given |= {f"OMPI_COMM_WORLD_{name}": str(number) for name in ("RANK", "LOCAL_RANK")}
            given["OMPI_COMM_WORLD_SIZE"] = "2"
        else:
            flags = ["--coordinator-address", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", number]
        typed = [sys.executable, *map(str, [*command, *flags, "--join-timeout", 60, *more[number]])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(typed, env=given, **pipes))
    return running


def ends(running: Sequence[subprocess.Popen]) -> list[subprocess.CompletedProcess]:
    """How they end; none is left behind."""
    try:
        said = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(running, said, strict=True)
    ]


def run(*command: Any, **options: Any) -> list[subprocess.CompletedProcess]:
    return ends(start(*command, **options))


def in_turn(
    commands: Mapping[str, Sequence[Any]], more: Mapping[str, Sequence[Sequence[str]]]
) -> dict[str, list[subprocess.CompletedProcess]]:
    """How each command ends in both processes, which run one after the other and exit as the last one does. ``more``:
    what each process adds to a command."""
    given = [[[*map(str, typed), *more.get(name, ((), ()))[n]] for name, typed in commands.items()] for n in range(2)]
    found: dict[str, list[subprocess.CompletedProcess]] = {name: [] for name in commands}
    for process in run("-c", IN_TURN, more=[[json.dumps(of)] for of in given]):
        said = [re.split(rf"{END} (\d+)\n", text) for text in (process.stderr, process.stdout)]
        codes = [int(code) for code in said[0][1::2]]
        assert len(codes) == len(commands) and process.returncode == codes[-1], process.stderr
        out = said[1][::2] if len(said[1]) > 1 else said[1] * len(codes)
        for name, code, *texts in zip(commands, codes, out, said[0][::2], strict=False):
            found[name].append(subprocess.CompletedProcess(name, code, *texts))
    return found


def alone(*command: Any, devices: int = 1) -> subprocess.CompletedProcess:
    """The same in one process."""
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment(devices), capture_output=True, text=True
    )
