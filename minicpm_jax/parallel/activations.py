"""Sharding constraints of activations, over the `ambient` mesh: rows, heads, tokens. Without a mesh all is as it is.

``cache``: the one that the tokens go through, if they do. Those are few rows, whose sums travel more cheaply than the
weights: their activations are left to XLA.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from minicpm_jax.parallel.mesh import BATCH, ambient, row_axes
from minicpm_jax.parallel.sharding import splits

ADDED_UP = "added up over tensor"  # the name of what is kept of a layer that the backward pass runs again


def shard_batch(x: Any) -> Any:
    """[B, ...] with its rows over the axes of batches, whole otherwise; as it is where none divides it. Without this
    XLA splits the hidden state as the weights are, every device then runs all rows, and sums travel in place of
    weights: 15 times the bytes of a step of MiniCPM-2B over 8 devices."""
    mesh = ambient()
    if mesh is None or not row_axes(mesh, len(x)):
        return x
    return _split(x, row_axes(mesh, len(x)))


def shard_heads(x: Any, cache: Any = None) -> Any:
    """[B, T, NH] as `shard_batch`, and its heads over tensor. XLA would make the heads an axis of the projection, and
    gather [N, H, D] anew in the backward pass, where an H of 64 fills 128 lanes: 0.4 GB of 6 of MiniCPM-1B over 8."""
    mesh = ambient()
    if cache is not None or mesh is None or not row_axes(mesh, len(x)):
        return x
    return _split(x, row_axes(mesh, len(x)), None, "tensor" if splits("tensor", x.shape[-1], mesh) else None)


def gather_then_shard_sequence(x: Any) -> Any:
    """`shard_sequence` by way of all rows on every device: what is split along its last axis, as the table of words is,
    comes by an all-gather, which runs beside arithmetic; from the one split to the other it would be an all-to-all."""
    mesh = ambient()
    return x if mesh is None else shard_sequence(_split(x, None, "tensor" if splits_tokens(x, mesh) else None))


def shard_sequence(x: Any) -> Any:
    """[B, T, ...] as `shard_batch`, and its tokens over tensor where that divides them: between the blocks, where every
    device of tensor would hold, and add up, the same (Megatron's sequence parallelism, arXiv 2205.05198)."""
    mesh = ambient()
    if mesh is None or not splits_tokens(x, mesh):
        return shard_batch(x)
    return _split(x, row_axes(mesh, len(x)), "tensor")


def all_gather_sequence(x: Any, cache: Any = None) -> Any:
    """From `shard_sequence` to `shard_batch`, at the start of a block. Both shardings are constrained. Otherwise XLA
    propagates the sequence sharding into the block's gradients and inserts all-to-alls; with both constraints the
    backward of the all-gather is a reduce-scatter."""
    return shard_batch(shard_sequence(x)) if cache is None and splits_tokens(x, ambient()) else x


def reduce_scatter_sequence(x: Any, cache: Any = None) -> Any:
    """From `shard_batch` to `shard_sequence`, at the end of a block: sums over tensor by a reduce-scatter. The result
    is named, so that a rematerialized backward pass keeps it instead of communicating again."""
    return (
        checkpoint_name(shard_sequence(shard_batch(x)), ADDED_UP)
        if cache is None and splits_tokens(x, ambient())
        else x
    )


def replicate_per_device(weight: Any, x: Any) -> Any:
    """[L, D] as [L, P, Q, D]: one copy for each device that holds its own rows and tokens of ``x`` [B, T, D] (see
    `shard_sequence`). A gradient stays on its device until all layers are done; then all are summed at once, in
    float32."""
    mesh = ambient()
    assert mesh is not None
    names, tokens = row_axes(mesh, len(x)), splits_tokens(x, mesh)
    parts = math.prod(mesh.shape[name] for name in names), mesh.shape["tensor"] if tokens else 1
    depth, width = weight.shape
    wide = jnp.broadcast_to(weight.astype(jnp.float32)[:, None, None], (depth, *parts, width))
    return _split(wide, None, names, "tensor" if tokens else None).astype(weight.dtype)


def _split(x: Any, *axes: Any) -> Any:
    """Its first axes over these of the ambient mesh, whole otherwise."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def splits_tokens(x: Any, mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether the mesh has an axis tensor that divides the T of [B, T, ...], while its other axes divide the rows."""
    if mesh is None or not splits("tensor", x.shape[1], mesh):
        return False
    return row_axes(mesh, len(x)) == tuple(name for name in BATCH if name in mesh.shape)
