"""Several processes, mostly one on each host, that run one command together.

JAX ends a process (with a trace and status 134) whose partners do not come; so they meet here first, where what is
wrong can be said. Each then sees its own devices and those of all, runs the same program in the same order, and holds
its part of every array. What is done once, the first of them does (`Together.once`), and prints and writes alone.
"""

import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from minicpm_data.runs import Alone
from minicpm_jax.device import platform
from minicpm_jax.placement import Placement, host_and_port
from weights_io.errors import InputError

LEAVING = 60  # seconds that a process waits at its end for the others; then JAX ends all of them
PAUSE = 0.2  # seconds between two tries to reach the first process


def join(options: Placement) -> None:
    """Make this process one of those that ``options`` name, once; nothing where they name none. All but the first
    are silent from now on, but for errors. Raises `InputError` where the others do not come."""
    if jax.distributed.is_initialized():
        return
    waiting = {"initialization_timeout": options.join_timeout, "shutdown_timeout_seconds": LEAVING}
    if options.distributed:
        try:
            jax.distributed.initialize(**waiting)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"--distributed finds no Cloud TPU, Slurm or Open MPI here ({str(error).splitlines()[0].rstrip('.')}); "
                "give --coordinator-address, --num-processes and --process-id."
            ) from error
    elif options.num_processes is not None and options.process_id is not None:
        address = options.coordinator_address or ""
        meet(address, options.num_processes, options.process_id, options.join_timeout)
        jax.distributed.initialize(address, options.num_processes, options.process_id, **waiting)
    platform()  # says so where JAX cannot start
    if jax.process_count() == 1:
        return
    if not jax.distributed.is_initialized():
        raise InputError(f"this is one of {jax.process_count()} hosts; run the command on each, with --distributed.")
    _print_alone(jax.process_index() == 0)


def _print_alone(first: bool) -> None:
    """What libraries write to the standard output goes to the other one: gloo tells of each connection. And what we
    print, nowhere in all processes but the first."""
    own = os.dup(1) if first else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)
    before = sys.stdout
    sys.stdout = open(own, "w", encoding=before.encoding, errors=before.errors)  # noqa: SIM115  (to the end)


def meet(address: str, processes: int, number: int, patience: float) -> None:
    """Return in all processes once all are there. The first listens at ``address``; the others call. `InputError`
    where the address cannot be, someone does not come within ``patience`` seconds, or two say different things."""
    host, port = host_and_port(address)
    deadline = time.monotonic() + patience
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise InputError(f"--coordinator-address {address}: {host} is not known here ({error.strerror}).") from error
    said = _gather(address, processes, deadline) if number == 0 else _call(address, processes, number, deadline)
    if said:
        raise InputError(said)


def _gather(address: str, processes: int, deadline: float) -> str:
    """What is wrong with the others, all of whom are told; "" where nothing is."""
    port, waiting = host_and_port(address)[1], set(range(1, processes))
    calls: list[socket.socket] = []
    wrong = ""
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", port), family=family, dualstack_ipv6=both) as server:
            while waiting and not wrong:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                call = server.accept()[0]
                calls.append(call)
                call.settimeout(PAUSE * 10)
                wrong = _wrong(call.recv(1024), processes, waiting)
    except TimeoutError:
        names = ", ".join(map(str, sorted(waiting)))
        wrong = f"of the {processes} processes, {names} did not come; start them, or give another --join-timeout."
    except OSError as error:
        return f"--coordinator-address {address}: cannot listen at port {port} ({error.strerror}); choose another."
    for call in calls:
        with call:
            try:
                call.sendall((wrong or "all are here").encode())
            except OSError:  # it gave up meanwhile
                continue
    return wrong


def _wrong(said: bytes, processes: int, waiting: set[int]) -> str:
    """What is wrong with a process that said this. It is taken from those that are waited for."""
    try:
        count, number = map(int, json.loads(said))
    except (ValueError, TypeError):
        return "another program called at --coordinator-address; choose another port."
    if count != processes:
        return f"--num-processes is {processes} in one process and {count} in another; give all the same."
    if number not in waiting:
        return f"two processes have --process-id {number}; give each its own."
    waiting.remove(number)
    return ""


def _call(address: str, processes: int, number: int, deadline: float) -> str:
    """What the first process says is wrong, or that it does not answer; "" where nothing is."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(host_and_port(address), timeout=left) as call:
                call.sendall(json.dumps([processes, number]).encode())
                call.settimeout(max(deadline - time.monotonic(), 0) + PAUSE * 10)  # it knows better who is missing
                answer = call.recv(1024).decode()
        except OSError:
            answer = ""
        if answer:
            return "" if answer == "all are here" else answer
        time.sleep(PAUSE)
    return f"nobody answers at --coordinator-address {address}; process 0 must run there."


class Together(Alone):
    """The processes of a run that JAX has joined."""

    def __init__(self) -> None:
        self.first = jax.process_index() == 0
        self._asked: jax.Array | None = None

    def once(self, action: Callable[[], object]) -> None:
        wrong = b""
        if self.first:
            try:
                action()
            except (InputError, OSError) as error:
                wrong = str(error).encode() or b"it failed"
        wait()
        said = from_first(np.frombuffer(wrong.ljust(TEXT)[:TEXT], np.uint8)).tobytes().decode(errors="ignore").strip()
        if said:
            raise InputError(said)

    def any(self, wanted: bool) -> bool:
        """What they wanted the time before: the answer is then there, and the devices need not stand still for it."""
        everywhere = NamedSharding(Mesh(jax.devices(), "all"), PartitionSpec("all"))
        mine = jax.make_array_from_callback((jax.device_count(),), everywhere, lambda _: np.array([wanted]))
        before, self._asked = self._asked, jnp.any(mine)
        return before is not None and bool(before)

    def check_same(self, said: str) -> None:
        from jax.experimental.multihost_utils import process_allgather

        digest = np.frombuffer(hashlib.sha256(said.encode()).digest(), np.uint8)
        different = np.flatnonzero((process_allgather(digest) != from_first(digest)).any(axis=1))
        if len(different):
            raise InputError(
                f"process {different[0]} has other options, another model or other data than process 0; give all the "
                "same."
            )


TEXT = 2048  # bytes of a sentence from one process to the others


def processes() -> Alone:
    """Those of this run."""
    return Together() if jax.process_count() > 1 else Alone()


def wait() -> None:
    """For all the processes, however long one of them works."""
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key="minicpm_jax", timeout_ms=24 * 3_600_000)


def from_first(values: np.ndarray) -> np.ndarray:
    """The first process's, in all of them. The others give an array of the same form."""
    if jax.process_count() == 1:
        return values
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return np.asarray(broadcast_one_to_all(values))


def fetched(array: Any) -> np.ndarray:
    """The whole of an array, in every process. Where parts of it lie with others, all must ask for it."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(array, tiled=True)
