"""The device that programs run on: its name, its memory, and the time spent compiling."""

import mlx.core as mx
from mlx.utils import tree_flatten

from minicpm_mlx.layers.fused_linear import fuse
from minicpm_mlx.model import Model
from weights_io.checkpoint import Checkpoint
from weights_io.memory import host_free


def description() -> str:
    """``Apple M2 Max``, ``cpu``."""
    device = mx.default_device()
    return "cpu" if device == mx.cpu else str(mx.device_info().get("device_name", "gpu"))


def is_first() -> bool:
    """Whether this process prints."""
    return True


def preferred_dtype(checkpoint: Checkpoint, decoding: bool = False) -> str:
    """The default dtype of the computation: the checkpoint's own."""
    return checkpoint.dtype


def usual_dtype(dtype: str) -> str:
    """``dtype``, or float32 on a CPU, which has no native arithmetic for others."""
    return "float32" if mx.default_device() == mx.cpu else dtype


def for_decoding(model: Model) -> Model:
    """The same model in the form that decodes fastest."""
    fuse(model)
    return model


def warn_idle_axes(model: Model, rows: int) -> None:
    """Does nothing: MLX has one device and no mesh."""


def peak_memory() -> int:
    """Most bytes that MLX held."""
    return mx.get_peak_memory()


def free_memory(model: Model | None = None) -> int | None:
    """Bytes left after the ``model``'s weights are read, which may not have happened yet. None if unknown."""
    used = mx.get_active_memory()
    coming = 0 if model is None else max(0, sum(x.nbytes for _, x in tree_flatten(model.parameters())) - used)
    if mx.default_device() == mx.cpu:
        free = host_free()
        return None if free is None else free - coming
    limit = mx.device_info().get("max_recommended_working_set_size")
    return None if limit is None else int(limit) - used - coming


def compile_seconds() -> float:
    """0: Metal's kernels are precompiled, or compile in milliseconds."""
    return 0.0
