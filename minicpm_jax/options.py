"""Options for where a command runs: on which devices, and in how many processes that work together.

    python -m minicpm_jax.finetune ... --coordinator-address 10.0.0.1:1234 --num-processes 2 --process-id 0
    python -m minicpm_jax.finetune ... --coordinator-address 10.0.0.1:1234 --num-processes 2 --process-id 1

Run one such command on each host. On Cloud TPU, Slurm or Open MPI, run the same ``... --distributed`` on all hosts.
"""

from dataclasses import dataclass
from typing import Any

from minicpm_jax.parallel.address import host_and_port
from weights_io.errors import InputError, flag
from weights_io.progress import hush


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Devices of a command that runs in one process."""

    mesh: str | None = None
    """Axes and sizes of the device mesh (all processes), such as data=2,fsdp=4. By default training puts all devices on
    fsdp; generation shards heads over tensor as long as that makes each device's cache smaller."""

    def placement(self) -> dict[str, Any]:
        """The arguments of ``load`` that concern devices."""
        from minicpm_jax.parallel.mesh import make_mesh

        return {"mesh": make_mesh(self.mesh)}


@dataclass(frozen=True, kw_only=True)
class Placement(Devices):
    distributed: bool = False
    """Join the processes that Cloud TPU, Slurm or Open MPI started. All of them must run this same command."""
    coordinator_address: str | None = None
    """Host and free port of the first process, such as 10.0.0.1:1234, if several processes run this command."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, from 0. Only process 0 prints and writes."""
    join_timeout: int = 300
    """Seconds to wait for the other processes at the start."""

    def check_placement(self) -> None:
        """Raises `InputError` for invalid flags or combinations of flags. Does not start JAX."""
        named = {name: getattr(self, name) for name in ("coordinator_address", "num_processes", "process_id")}
        missing = [flag(name) for name, value in named.items() if value is None]
        if self.distributed and len(missing) < len(named):
            raise InputError(
                "finds the other processes by itself; leave the flags that name them away.", option="distributed"
            )
        if 0 < len(missing) < len(named):
            raise InputError(
                f"{' and '.join(missing)} must be given too: several processes need all three of "
                "--coordinator-address, --num-processes and --process-id."
            )
        if self.join_timeout < 1:
            raise InputError(f"is {self.join_timeout}; it must be at least 1.", option="join_timeout")
        if self.num_processes is None or self.process_id is None:
            return
        if self.num_processes < 1:
            raise InputError(f"is {self.num_processes}; it must be at least 1.", option="num_processes")
        if not 0 <= self.process_id < self.num_processes:
            raise InputError(
                f"is {self.process_id}; the {self.num_processes} processes of {{num_processes}} have the "
                f"ids 0 to {self.num_processes - 1}.",
                option="process_id",
                others=["num_processes"],
            )
        host_and_port(self.coordinator_address or "")

    def placement(self) -> dict[str, Any]:
        """The arguments of ``load`` that concern devices. Waits for the other processes, if there are any."""
        self.check_placement()
        from minicpm_jax.parallel.rendezvous import join

        join(self.distributed, self.coordinator_address, self.num_processes, self.process_id, self.join_timeout)
        if self.distributed or self.num_processes is not None:
            import jax

            hush(jax.process_index() > 0)
        return super().placement()


@dataclass(frozen=True, kw_only=True)
class Serving(Devices):
    """The default mesh is the one that `minicpm_jax.fit` compiles generation for: it shards heads over devices."""

    def placement(self) -> dict[str, Any]:
        found = super().placement()
        if self.mesh is None and found["mesh"] is not None:
            from minicpm_jax.parallel.sharding import serving_mesh

            found["mesh"] = serving_mesh  # of the config, once the checkpoint is open
        return found
