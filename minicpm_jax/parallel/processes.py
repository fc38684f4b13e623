"""Several processes, mostly one on each host, that run one command together.

JAX ends a process (with a trace and status 134) whose partners do not come; so they meet here first, where what is
wrong can be said. Each then sees its own devices and those of all, runs the same program in the same order, and holds
its part of every array. Only process 0 prints and writes; work to be done once goes to it
(`MultiProcess.on_main_process`).
"""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from minicpm_data.training.processes import SingleProcess
from weights_io.errors import InputError


class MultiProcess(SingleProcess):
    """The processes of a run that JAX has joined."""

    def __init__(self) -> None:
        self.first = jax.process_index() == 0
        self._asked: jax.Array | None = None

    def on_main_process(self, action: Callable[[], object]) -> None:
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

    def check_consistent(self, said: str) -> None:
        from jax.experimental.multihost_utils import process_allgather

        digest = np.frombuffer(hashlib.sha256(said.encode()).digest(), np.uint8)
        different = np.flatnonzero((process_allgather(digest) != from_first(digest)).any(axis=1))
        if len(different):
            raise InputError(
                f"process {different[0]} has other options, another model or other data than process 0; give all the "
                "same."
            )


TEXT = 2048  # bytes of a sentence from one process to the others


def processes() -> SingleProcess:
    """Those of this run."""
    return MultiProcess() if jax.process_count() > 1 else SingleProcess()


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
