"""Logical axes of the parameter table to mesh axes."""

from jax.sharding import Mesh, PartitionSpec

# Logical axis -> mesh axis. Matrices are split over fsdp along the hidden size and over tensor along the other one.
RULES = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
}


def partition_spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The mesh axis of each dimension. A dimension that its mesh axis does not divide stays whole."""
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        name = RULES[axis]
        spec.append(name if name in mesh.shape and size % mesh.shape[name] == 0 else None)
    return PartitionSpec(*spec)
