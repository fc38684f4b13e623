"""Several processes become one run: they meet, JAX is initialized, and the first alone prints."""

import json
import os
import socket
import sys
import time

import jax

from minicpm_jax.parallel.address import host_and_port
from minicpm_jax.parallel.chips import platform
from weights_io.errors import InputError, listed

LEAVING = 60  # seconds that a process waits at its end for the others; then JAX ends all of them
PAUSE = 0.2  # seconds between two tries to reach the first process


def join(
    distributed: bool,
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    join_timeout: int,
) -> None:
    """Make this process one of several, once; nothing where they are not named. All but the first are silent from now
    on, but for errors.

    Arguments:
        distributed: Cloud TPU, Slurm or Open MPI names them.
        coordinator_address: the first one's host and port; with it ``num_processes`` and ``process_id``.
        join_timeout: seconds to wait for the others.

    Raises `InputError` where the others do not come."""
    if jax.distributed.is_initialized():
        return
    waiting = {"initialization_timeout": join_timeout, "shutdown_timeout_seconds": LEAVING}
    if distributed:
        try:
            jax.distributed.initialize(**waiting)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"finds no Cloud TPU, Slurm or Open MPI here ({str(error).splitlines()[0].rstrip('.')}); "
                "give --coordinator-address, --num-processes and --process-id.",
                option="distributed",
            ) from error
    elif num_processes is not None and process_id is not None:
        address = coordinator_address or ""
        meet(address, num_processes, process_id, join_timeout)
        jax.distributed.initialize(address, num_processes, process_id, **waiting)
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
        raise InputError(
            f"{address}: {host} is not known here ({error.strerror}).", option="coordinator_address"
        ) from error
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
        names = listed(sorted(waiting))
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
