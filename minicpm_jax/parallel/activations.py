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


def by_rows(x: Any) -> Any:
    """[B, ...] with its rows over the axes of batches, whole otherwise; as it is where none divides it. Without this
    XLA splits the hidden state as the weights are, every device then runs all rows, and sums travel in place of
    weights: 15 times the bytes of a step of MiniCPM-2B over 8 devices."""
    mesh = ambient()
    if mesh is None or not row_axes(mesh, len(x)):
        return x
    return _split(x, row_axes(mesh, len(x)))


def by_heads(x: Any, cache: Any = None) -> Any:
    """[B, T, NH] as `by_rows`, and its heads over tensor. XLA would make the heads an axis of the projection, and
    gather [N, H, D] anew in the backward pass, where an H of 64 fills 128 lanes: 0.4 GB of 6 of MiniCPM-1B over 8."""
    mesh = ambient()
    if cache is not None or mesh is None or not row_axes(mesh, len(x)):
        return x
    return _split(x, row_axes(mesh, len(x)), None, "tensor" if splits("tensor", x.shape[-1], mesh) else None)


def gathered_rows(x: Any) -> Any:
    """`by_tokens` by way of all rows on every device: what is split along its last axis, as the table of words is,
    comes by an all-gather, which runs beside arithmetic; from the one split to the other it would be an all-to-all."""
    mesh = ambient()
    return x if mesh is None else by_tokens(_split(x, None, "tensor" if splits_tokens(x, mesh) else None))


def by_tokens(x: Any) -> Any:
    """[B, T, ...] as `by_rows`, and its tokens over tensor where that divides them: between the blocks, where every
    device of tensor would hold, and add up, the same (Megatron's sequence parallelism, arXiv 2205.05198)."""
    mesh = ambient()
    if mesh is None or not splits_tokens(x, mesh):
        return by_rows(x)
    return _split(x, row_axes(mesh, len(x)), "tensor")


def gathered_tokens(x: Any, cache: Any = None) -> Any:
    """From `by_tokens` to `by_rows`, where a block begins. Either way both are named, so that an all-gather's gradient
    is a reduce-scatter: XLA would carry the one split into the block's gradients, by all-to-alls."""
    return by_rows(by_tokens(x)) if cache is None and splits_tokens(x, ambient()) else x


def scattered_tokens(x: Any, cache: Any = None) -> Any:
    """From `by_rows` to `by_tokens`, where a block ends: its sums over tensor by a reduce-scatter, which has the name
    by which a backward pass that runs the block again finds what came of it."""
    return checkpoint_name(by_tokens(by_rows(x)), ADDED_UP) if cache is None and splits_tokens(x, ambient()) else x


def copies(weight: Any, x: Any) -> Any:
    """[L, D] as [L, P, Q, D]: a copy for each device that `by_tokens` gives rows and tokens of ``x`` [B, T, D] of its
    own. A gradient then stays on its device until the layers are done, and all are added up at once, in float32."""
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
