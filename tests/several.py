"""Runs of one command in several processes of two devices each, as several hosts would have them."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

DEVICES = 2


def environment(devices: int) -> dict[str, str]:
    """That of this process, with so many devices."""
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    return os.environ | {"XLA_FLAGS": flags}


def start(*command: Any, processes: int = 2, more: Sequence[Sequence[str]] = ((), ())) -> list[subprocess.Popen]:
    """``python COMMAND`` with the flags that make the processes one run, and ``more`` of each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ["--coordinator-address", address, "--num-processes", processes, "--join-timeout", 60, "--process-id"]
    return [
        subprocess.Popen(
            [sys.executable, *map(str, [*command, *flags, number, *more[number]])],
            env=environment(DEVICES),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]


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


def alone(*command: Any, devices: int = 1) -> subprocess.CompletedProcess:
    """The same in one process."""
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment(devices), capture_output=True, text=True
    )
