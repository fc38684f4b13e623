"""Meshes of devices, and how a batch is sharded over one."""

import bisect
import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from weights_io.config import ModelConfig
from weights_io.errors import InputError

AXES = ("data", "fsdp", "tensor", "expert")  # of a mesh; data splits batches, and no weights
BATCH = ("data", "fsdp")  # what a batch's rows are split over
MeshChoice: TypeAlias = "Mesh | Callable[[ModelConfig], Mesh | None] | None"  # a mesh, or what makes one of a config

F = TypeVar("F", bound=Callable[..., Any])


def ambient() -> AbstractMesh | None:
    """The mesh that the program which is being traced runs over; None where it has none, and within `jax.shard_map`,
    where each device runs by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or not mesh.are_all_axes_auto else mesh


def over(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Within it the mesh is the `ambient` one of what is traced; of None that stays as it is."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def over_its_mesh(function: F) -> F:
    """A method of a model, or a function of one, `over` the model's mesh."""

    @functools.wraps(function)
    def inside(model: Any, *arguments: Any, **more: Any) -> Any:
        with over(model.mesh):
            return function(model, *arguments, **more)

    return inside  # type: ignore[return-value]


def make_mesh(text: str | None, given: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of ``fsdp=4,tensor=2`` over the ``given`` devices (None: all there are); None: all devices along fsdp,
    or no mesh on a single one or on the CPUs of one process. Raises `InputError` where it does not fit the devices."""
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
    """Of arrays [A, B, ...] whose B ``rows`` are split over the mesh. `InputError` where they cannot be."""
    names = tuple(name for name in BATCH if name in mesh.shape)
    parts = math.prod(mesh.shape[name] for name in names)
    if rows % parts:
        devices = f"{parts} devices of {' and '.join(names)}"
        raise InputError(f"{rows} does not divide over the {devices}.", option="batch_size")
    return NamedSharding(mesh, PartitionSpec(None, names))


def own_rows(mesh: Mesh | None, rows: int) -> Sequence[int]:
    """Which of a batch's ``rows`` lie on devices of this process, in order."""
    if mesh is None:
        return range(rows)
    parts = batch_sharding(mesh, rows).addressable_devices_indices_map((1, rows)).values()
    return sorted({row for _, part in parts for row in range(rows)[part]})


def placed_rows(arrays: Mapping[str, np.ndarray], mesh: Mesh | None, rows: int) -> Mapping[str, Any]:
    """Arrays [A, B, ...] over the mesh, of each of which this process has its `own_rows` alone: [A, own, ...]."""
    if mesh is None:
        return arrays
    sharding, own = batch_sharding(mesh, rows), own_rows(mesh, rows)

    def placed(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            wanted = range(rows)[index[1]]
            at = bisect.bisect_left(own, wanted.start)
            return array[:, at : at + len(wanted)]

        return jax.make_array_from_callback((len(array), rows, *array.shape[2:]), sharding, part)

    return {name: placed(array) for name, array in arrays.items()}


def row_axes(mesh: Mesh | AbstractMesh, rows: int) -> tuple[str, ...]:
    """The axes that split a batch of so many rows, as far as they divide it."""
    names: tuple[str, ...] = ()
    for name in BATCH:
        if name in mesh.shape and rows % math.prod(mesh.shape[n] for n in (*names, name)) == 0:
            names = *names, name
    return names


def rows_split(mesh: Mesh | AbstractMesh | None) -> int:
    """Over how many parts a batch's rows are split."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in BATCH if name in mesh.shape)


def mesh_for(choice: MeshChoice, config: ModelConfig) -> Mesh | None:
    """The mesh that is chosen for a model, as `automatic` has it; None: it lies on one device."""
    if callable(choice) and not isinstance(choice, Mesh):  # a mesh can be called, too: it decorates functions
        choice = choice(config)
    return None if choice is None else automatic(choice)


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with axes along which XLA finds the shardings of a program; those of `jax.make_mesh` are explicit.
    Raises `InputError` for axes that are not ours, and for what is no mesh."""
    if not isinstance(mesh, Mesh):
        raise InputError(f"mesh is {mesh!r}; give what minicpm_jax.parallel.mesh.make_mesh('fsdp=4,tensor=2') makes.")
    unknown = [name for name in mesh.axis_names if name not in AXES]
    if unknown:
        raise InputError(f"the mesh has the axis {unknown[0]!r}; name its axes {', '.join(AXES)} (any of them).")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
