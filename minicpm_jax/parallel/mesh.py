"""Meshes of devices, and the sharding of a batch over a mesh."""

import bisect
import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from minicpm_data.datasets.images import PIXELS, PLACES, sizes_of
from weights_io.config import ModelConfig
from weights_io.errors import InputError

AXES = ("data", "fsdp", "tensor", "expert")  # axes of a mesh; data shards batches but no weights
BATCH = ("data", "fsdp")  # axes that shard a batch's rows
MeshChoice: TypeAlias = "Mesh | Callable[[ModelConfig], Mesh | None] | None"  # a mesh, or a function of the config

F = TypeVar("F", bound=Callable[..., Any])


def ambient_mesh() -> AbstractMesh | None:
    """The mesh of the program that is being traced. None without one, and inside `jax.shard_map`, where each device
    runs alone."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or not mesh.are_all_axes_auto else mesh


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which ``mesh`` is the `ambient_mesh` mesh of traced code; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def with_model_mesh(function: F) -> F:
    """Decorator: run a function, whose first argument is a model, in the context of the model's mesh."""

    @functools.wraps(function)
    def inside(model: Any, *arguments: Any, **more: Any) -> Any:
        with use_mesh(model.mesh):
            return function(model, *arguments, **more)

    return inside  # type: ignore[return-value]


def make_mesh(text: str | None, given: Sequence[Any] | None = None) -> Mesh | None:
    """Build a mesh from its text form.

    Arguments:
        text: axis sizes such as ``fsdp=4,tensor=2``. None: all devices along fsdp, or no mesh on a single device or on
            the CPUs of one process.
        given: the devices; None: all.

    Returns: the mesh, or None.

    Raises: `InputError` if the text is malformed or its sizes do not match the number of devices.
    """
    devices = jax.device_count() if given is None else len(given)
    if text is None:
        alone = given is None and jax.process_count() == 1
        if devices == 1 or (alone and jax.default_backend() == "cpu"):
            return None
        text = f"fsdp={devices}"
    sizes = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise InputError(
                f"{text} is not of the form fsdp=4,tensor=2; the axes are {', '.join(AXES)}.", option="mesh"
            )
        sizes[name] = int(size)
    if math.prod(sizes.values()) != devices:
        raise InputError(f"{text} is for {math.prod(sizes.values())} devices; there are {devices}.", option="mesh")
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=given)


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """The sharding of arrays [A, B, ...] whose B ``rows`` are sharded over the mesh. Raises `InputError` if the mesh
    does not divide them."""
    names = tuple(name for name in BATCH if name in mesh.shape)
    parts = math.prod(mesh.shape[name] for name in names)
    if rows % parts:
        devices = f"{parts} devices of {' and '.join(names)}"
        raise InputError(f"{rows} does not divide over the {devices}.", option="batch_size")
    return NamedSharding(mesh, PartitionSpec(None, names))


def local_rows(mesh: Mesh | None, rows: int) -> Sequence[int]:
    """The batch rows that devices of this process hold, in order."""
    if mesh is None:
        return range(rows)
    parts = batch_sharding(mesh, rows).addressable_devices_indices_map((1, rows)).values()
    return sorted({row for _, part in parts for row in range(rows)[part]})


def shard_rows(arrays: Mapping[str, np.ndarray], mesh: Mesh | None, rows: int) -> Mapping[str, Any]:
    """Arrays [A, B, ...] sharded over the mesh, from this process's `local_rows` of each: [A, local, ...]."""
    if mesh is None:
        return arrays
    sharding, own = batch_sharding(mesh, rows), local_rows(mesh, rows)

    def placed(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            wanted = range(rows)[index[1]]
            at = bisect.bisect_left(own, wanted.start)
            return array[:, at : at + len(wanted)]

        return jax.make_array_from_callback((len(array), rows, *array.shape[2:]), sharding, part)

    images = {name: arrays[name] for size in sizes_of(arrays) for name in (f"{PIXELS}{size}", f"{PLACES}{size}")}
    if images and jax.process_count() > 1:
        raise InputError("images are trained on by one process; run the command on one host.")
    whole = jax.device_put(images, NamedSharding(mesh, PartitionSpec()))  # every device encodes all of them
    return {name: placed(array) for name, array in arrays.items() if name not in images} | whole


def row_axes(mesh: Mesh | AbstractMesh, rows: int) -> tuple[str, ...]:
    """The batch axes of the mesh that divide a batch of ``rows``."""
    names: tuple[str, ...] = ()
    for name in BATCH:
        if name in mesh.shape and rows % math.prod(mesh.shape[n] for n in (*names, name)) == 0:
            names = *names, name
    return names


def batch_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Number of parts into which the mesh shards a batch."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in BATCH if name in mesh.shape)


def mesh_for(choice: MeshChoice, config: ModelConfig) -> Mesh | None:
    """The `automatic` mesh chosen for a model; None: a single device."""
    if callable(choice) and not isinstance(choice, Mesh):  # a mesh is callable too: it decorates functions
        choice = choice(config)
    return None if choice is None else automatic(choice)


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with automatic axes, for which XLA derives shardings; `jax.make_mesh` makes explicit axes. Raises
    `InputError` for unknown axes, and if ``mesh`` is not a mesh."""
    if not isinstance(mesh, Mesh):
        raise InputError(f"mesh is {mesh!r}; give what minicpm_jax.parallel.mesh.make_mesh('fsdp=4,tensor=2') makes.")
    unknown = [name for name in mesh.axis_names if name not in AXES]
    if unknown:
        raise InputError(f"the mesh has the axis {unknown[0]!r}; name its axes {', '.join(AXES)} (any of them).")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
