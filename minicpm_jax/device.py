"""The device that programs run on: its name, its memory, and the time spent compiling."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh

from minicpm_jax.cpu.form import form_of
from minicpm_jax.parallel.chips import Chip, chip_of, platform
from minicpm_jax.parallel.mesh import MeshChoice, mesh_for
from minicpm_jax.parallel.sharding import warn_idle_mesh_axes
from weights_io.checkpoint import Checkpoint
from weights_io.memory import host_free

if TYPE_CHECKING:
    from minicpm_jax.model import Model

_compiled = threading.local()  # ``seconds`` of each thread: what is compiled beside the work does not delay it


def _listen(event: str, seconds: float, **_) -> None:
    if event.startswith("/jax/core/compile/"):
        count_compiling(seconds)


def count_compiling(seconds: float) -> None:
    """Count seconds that this thread has spent on compiling, or on waiting for it."""
    _compiled.seconds = compile_seconds() + seconds


jax.monitoring.register_event_duration_secs_listener(_listen)


def description() -> str:
    """``TPU v5 lite x 8``, ``cpu``."""
    devices = jax.devices()
    return devices[0].device_kind + (f" x {len(devices)}" if len(devices) > 1 else "")


def is_first() -> bool:
    """Whether this process prints."""
    return jax.process_index() == 0


def preferred_dtype(checkpoint: Checkpoint, decoding: bool = False, mesh: MeshChoice = None) -> str:
    """The default dtype of the computation: the one in which the form for ``decoding`` is fast, or `usual_dtype` of
    the checkpoint's own."""
    form = form_of(decoding, mesh_for(mesh, checkpoint.config))
    return form.dtype(checkpoint) or usual_dtype(checkpoint.dtype)


def usual_dtype(dtype: str) -> str:
    """``dtype``, or float32 if the attention kernels support nothing else (v2, v3) or on a CPU, where XLA's bfloat16
    is up to ten times slower."""
    chip = _chip()
    return "float32" if platform() == "cpu" or (chip and not chip.bfloat16_kernels) else dtype


def check_dtype(dtype: str) -> None:
    """Raise `InputError` if the device cannot compute in ``dtype``."""
    if chip := _chip():
        chip.check_dtype(dtype)


def _chip() -> Chip | None:
    return chip_of(jax.devices()[0].device_kind) if platform() == "tpu" else None


def warn_idle_axes(model: "Model", rows: int) -> None:
    """Warn about idle axes of the model's mesh for a batch of ``rows`` prompts (`warn_idle_mesh_axes`)."""
    warn_idle_mesh_axes(model.config, model.mesh, rows)


def peak_memory() -> int:
    """Most bytes that the fullest device held; on a CPU, that this process held."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if any(stats):
        return max(s["peak_bytes_in_use"] for s in stats if s)
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(mesh: Mesh | None = None) -> int | None:
    """Free bytes on the fullest device of the ``mesh`` (None: the first device, which holds a model without a mesh).
    Devices simulated on a CPU share its memory. None if unknown.

    If the mesh spans several processes, all of them must call this: a process that ran out of memory and left alone
    would leave the others waiting.
    """
    free = _free(jax.local_devices()[:1] if mesh is None else mesh.local_devices)
    if mesh is None or not mesh.is_multi_process:
        return free
    from jax.experimental.multihost_utils import process_allgather

    unknown = np.iinfo(np.int64).max
    own = np.array([unknown if free is None else free]).view(np.uint8)  # as bytes: JAX has no int64
    least = int(process_allgather(own).view(np.int64).min())
    return None if least == unknown else least


def _free(devices: Sequence[jax.Device]) -> int | None:
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in s for s in stats):
        return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    free = host_free() if jax.default_backend() == "cpu" else None
    return None if free is None else free // len(devices)


def compile_seconds() -> float:
    """Seconds that this thread has spent on tracing and compiling so far."""
    return getattr(_compiled, "seconds", 0.0)
