"""Sharding constraints on activations over the `ambient_mesh` mesh: batch, heads, sequence. Without a mesh they do
nothing.

``cache``: the cache that the tokens go through, if there is one. Then tokens are few, and summing their activations
is cheaper than gathering weights: XLA chooses their sharding.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from minicpm_jax.parallel.mesh import BATCH, ambient_mesh, row_axes
from minicpm_jax.parallel.sharding import splits

ADDED_UP = "added up over tensor"  # checkpoint name of the sums that rematerialization keeps


def shard_batch(x: Any) -> Any:
    """Shard the rows of [B, ...] over the batch axes and replicate the rest; unchanged if no axis divides the rows.

    Otherwise XLA shards the hidden state like the weights. Every device then runs all rows, and sums are
    communicated in place of weights: 15 times the bytes in a step of MiniCPM-2B over 8 devices.
    """
    mesh = ambient_mesh()
    if mesh is None or not row_axes(mesh, len(x)):
        return x
    return _split(x, row_axes(mesh, len(x)))


def shard_heads(x: Any, cache: Any = None) -> Any:
    """Shard [B, T, NH] like `shard_batch`, and its heads over tensor.

    Otherwise XLA makes the heads an axis of the projection and gathers [N, H, D] again in the backward pass, where
    an H of 64 fills 128 lanes: 0.4 GB of 6 for MiniCPM-1B over 8 devices.
    """
    mesh = ambient_mesh()
    if cache is not None or mesh is None or not row_axes(mesh, len(x)):
        return x
    return _split(x, row_axes(mesh, len(x)), None, "tensor" if splits("tensor", x.shape[-1], mesh) else None)


def gather_then_shard_sequence(x: Any) -> Any:
    """`shard_sequence` by way of all rows on every device. An array that is sharded along its last axis, as the
    embedding table is, then arrives by an all-gather, which overlaps with arithmetic; the direct path would be an
    all-to-all."""
    mesh = ambient_mesh()
    return x if mesh is None else shard_sequence(_split(x, None, "tensor" if splits_tokens(x, mesh) else None))


def shard_sequence(x: Any) -> Any:
    """Shard [B, T, ...] like `shard_batch`, and its tokens over tensor if that divides them. Used between blocks,
    where all devices of tensor would otherwise hold and add the same values (sequence parallelism of Megatron, arXiv
    2205.05198)."""
    mesh = ambient_mesh()
    if mesh is None or not splits_tokens(x, mesh):
        return shard_batch(x)
    return _split(x, row_axes(mesh, len(x)), "tensor")


def all_gather_sequence(x: Any, cache: Any = None) -> Any:
    """From `shard_sequence` to `shard_batch`, at the start of a block. Both shardings are constrained. Otherwise XLA
    propagates the sequence sharding into the block's gradients and inserts all-to-alls; with both constraints the
    backward of the all-gather is a reduce-scatter."""
    return shard_batch(shard_sequence(x)) if cache is None and splits_tokens(x, ambient_mesh()) else x


def reduce_scatter_sequence(x: Any, cache: Any = None) -> Any:
    """From `shard_batch` to `shard_sequence`, at the end of a block: sums over tensor by a reduce-scatter. The result
    is named, so that a rematerialized backward pass keeps it instead of communicating again."""
    return (
        checkpoint_name(shard_sequence(shard_batch(x)), ADDED_UP)
        if cache is None and splits_tokens(x, ambient_mesh())
        else x
    )


def replicate_per_device(weight: Any, x: Any) -> Any:
    """[L, D] as [L, P, Q, D]: one copy for each device that holds its own rows and tokens of ``x`` [B, T, D] (see
    `shard_sequence`). A gradient stays on its device until all layers are done; then all are summed at once, in
    float32."""
    mesh = ambient_mesh()
    assert mesh is not None
    names, tokens = row_axes(mesh, len(x)), splits_tokens(x, mesh)
    parts = math.prod(mesh.shape[name] for name in names), mesh.shape["tensor"] if tokens else 1
    depth, width = weight.shape
    wide = jnp.broadcast_to(weight.astype(jnp.float32)[:, None, None], (depth, *parts, width))
    return _split(wide, None, names, "tensor" if tokens else None).astype(weight.dtype)


def _split(x: Any, *axes: Any) -> Any:
    """Shard the first axes over these axes of the ambient mesh; replicate the rest."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def splits_tokens(x: Any, mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether the mesh has an axis tensor that divides T of [B, T, ...], and its batch axes divide the rows."""
    if mesh is None or not splits("tensor", x.shape[1], mesh):
        return False
    return row_axes(mesh, len(x)) == tuple(name for name in BATCH if name in mesh.shape)
