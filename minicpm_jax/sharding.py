"""Logical axes of the parameter table to mesh axes."""

from jax.sharding import AxisType, Mesh, PartitionSpec

from weights_io.errors import InputError

AXES = ("data", "fsdp", "tensor", "expert")  # of a mesh; data splits batches, and no weights

# Logical axis -> mesh axis. Matrices are split over fsdp along the hidden size and over tensor along the other one;
# the router is small and every device sends its own tokens.
RULES = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "router": None,
    "layers": None,
}


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with axes along which XLA finds the shardings of a program; those of `jax.make_mesh` are explicit."""
    unknown = [name for name in mesh.axis_names if name not in AXES]
    if unknown:
        raise InputError(f"the mesh has the axis {unknown[0]!r}; name its axes {', '.join(AXES)} (any of them).")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def partition_spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The mesh axis of each dimension. A dimension that its mesh axis does not divide stays whole."""
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        name = RULES[axis]
        spec.append(name if splits(name, size, mesh) else None)
    return PartitionSpec(*spec)


def splits(name: str | None, size: int, mesh: Mesh) -> bool:
    """Whether the mesh has that axis and it divides a dimension of that size."""
    return name in mesh.shape and size % mesh.shape[name] == 0
