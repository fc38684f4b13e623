"""Mapping of the parameter table's logical axes to mesh axes."""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from minicpm_jax.parallel.chips import LANES
from minicpm_jax.parallel.mesh import BATCH, batch_shards, make_mesh, row_axes
from weights_io.casting import GROUPS
from weights_io.config import ModelConfig
from weights_io.parameters import parameters

# Logical axis -> mesh axis. Matrices are sharded over fsdp along the hidden size and over tensor along the other axis.
# The router is small, and every device routes its own tokens; norms are small, and gathering them took longer.
RULES = {
    "vocab": "tensor",
    "embed": "fsdp",
    "norm": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "latent": None,  # all heads are computed from it
    "from_latent": "fsdp",
    "expert": "expert",
    "router": None,
    "vision_out": "tensor",
    "vision_in": "fsdp",
    "layers": None,
}


def warn_idle_mesh_axes(config: ModelConfig, mesh: Mesh | None, rows: int) -> None:
    """Print to stderr which mesh axes are idle (their devices repeat each other's work) for a batch of ``rows``. If
    an axis shards weights but cannot shard the batch, every device on it processes all rows with its shard of the
    weights. Also print where tensor has more devices than the model has key/value heads (`pad_config`)."""
    if mesh is None or jax.process_index() > 0:
        return
    sizes = {name: size for name, size in mesh.shape.items() if size > 1}
    of_weights = {name for sharding in shardings(pad_config(config, mesh), mesh).values() for name in sharding.spec}
    of_rows = row_axes(mesh, rows)
    whole = [n for n in BATCH if n in sizes and n not in of_rows and n not in of_weights]
    if whole:
        over = ",".join(f"{name}={sizes[name]}" for name in whole)
        what = "1 row" if rows == 1 else f"{rows} rows together"
        remedy = f"a multiple of {batch_shards(mesh)} rows would be split"
        print(f"note: {what} cannot be split over {over}, whose devices all run the same; {remedy}", file=sys.stderr)
    for name in [n for n in sizes if n not in BATCH and n not in of_weights]:
        what = f"{name}={sizes[name]} splits none of this model's weights"
        print(f"note: {what}, and its devices all run the same; take another axis", file=sys.stderr)
    heads, parts = config.num_key_value_heads, sizes.get("tensor", 1)
    if parts > heads:
        what = f"tensor={parts} splits {heads} key/value heads, so {parts - heads} of {parts} devices attend to padding"
        print(f"note: {what}; a smaller tensor, with fsdp for the rest, takes less memory", file=sys.stderr)


def pad_config(config: ModelConfig, mesh: Mesh | None, packed: bool = False) -> ModelConfig:
    """The config of a model's padded shapes on a mesh: axes sharded over tensor are zero-padded at the end to a
    multiple of tensor. ``packed``: the matrices are quantized.

    Zeros change nothing. A padded head mixes values of zero and has zero columns in ``o_proj``; a zero gate closes;
    padded vocabulary is cut off (`Model.head`) or masked (`cross_entropy`). So their gradients are zero too.
    """
    parts = 1 if mesh is None else mesh.shape.get("tensor", 1)
    tpu = mesh is not None and mesh.devices.flat[0].platform == "tpu"
    return pad_config_over(config, parts, LANES if tpu else 1, packed)


def pad_config_over(config: ModelConfig, parts: int, lanes: int = LANES, packed: bool = False) -> ModelConfig:
    """`pad_config` for ``parts`` devices along tensor. Query heads are padded together with their key/value heads.

    The key/value heads of a device fill whole registers of ``lanes``: for a cache with 9 heads of 64 XLA would pick
    another layout and copy it for the kernel, and in tiles it takes as much memory as one with 10. The neurons of
    ``packed`` matrices fill registers and quantization groups too: with 720 neurons per device (2B) XLA would copy
    all layers in every step.
    """
    if parts == 1:
        return config
    neurons = parts * math.lcm(lanes, GROUPS[0]) if packed else parts
    filled = 1 if config.is_latent else lanes // math.gcd(lanes, config.head_dim)  # the heads share their latents
    heads = _multiple(config.num_key_value_heads, parts * filled)
    return dataclasses.replace(
        config,
        num_key_value_heads=heads,
        num_attention_heads=config.num_attention_heads // config.num_key_value_heads * heads,
        intermediate_size=_multiple(config.intermediate_size, neurons),
        vocab_size=_multiple(config.vocab_size, parts),
    )


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def pad_or_trim(x: Any, shape: tuple[int, ...]) -> Any:
    """Zero-pad or cut each axis at its end to ``shape``."""
    if x.shape == shape:
        return x
    x = x[tuple(slice(size) for size in shape)]
    more = [(0, wanted - size) for size, wanted in zip(x.shape, shape, strict=True)]
    return (np if isinstance(x, np.ndarray) else jnp).pad(x, more)


def pad_or_trim_params(weights: Mapping[str, Any], config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """`pad_or_trim` parameters to the shapes of a config (the model's own, or `pad_config`'s), sharded accordingly."""
    where = shardings(config, mesh)
    changed = {p.name: p.shape(config) for p in parameters(config) if weights[p.name].shape != p.shape(config)}
    made = {
        name: jax.jit(pad_or_trim, static_argnums=1, out_shardings=where[name])(weights[name], shape)
        for name, shape in changed.items()
    }
    return {**weights, **made}


def shardings(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of each parameter.

    Arguments:
        config: the model's config, or `pad_config`'s for the padded shapes of a model on the mesh.
        mesh: a mesh with any of the axes data, fsdp, tensor, expert.

    Returns: parameter name -> `NamedSharding`.
    """
    return {
        p.name: NamedSharding(mesh, partition_spec(p.logical_axes(), p.shape(config), mesh)) for p in parameters(config)
    }


def fraction_per_device(config: ModelConfig, mesh: Mesh | None) -> float:
    """The fraction of all weights that each device holds."""
    if mesh is None:
        return 1.0
    where = shardings(config, mesh)
    here = sum(math.prod(where[p.name].shard_shape(p.shape(config))) for p in parameters(config))
    return here / sum(math.prod(p.shape(config)) for p in parameters(config))


def replicated(tree: Any, mesh: Mesh) -> Any:
    """The arrays replicated on every device. `device_put` aborts if the processes' arrays differ, before an error
    can say which do (`processes.MultiProcess.check_consistent`)."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)
    tree = jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index]), tree)


def partition_spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The mesh axis of each dimension. A dimension that is not a multiple of its mesh axis is replicated."""
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        name = RULES[axis]
        spec.append(name if splits(name, size, mesh) else None)
    return PartitionSpec(*spec)


def splits(name: str | None, size: int, mesh: Mesh | AbstractMesh) -> bool:
    """Whether the mesh has the axis ``name`` and it divides a dimension of this size."""
    return name in mesh.shape and size % mesh.shape[name] == 0


def serving_mesh(config: ModelConfig, given: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh for generation, by `default_mesh`, over the ``given`` devices (None: all); None for a single device.
    `loading.load` accepts this function as its ``mesh``."""
    devices = jax.device_count() if given is None else len(given)
    return None if devices == 1 else make_mesh(default_mesh(config, devices, training=False), given)


def default_mesh(config: ModelConfig, devices: int, training: bool) -> str:
    """The default mesh as text. Training shards rows and weights alike over fsdp. Generation shards heads, so that
    only activations are communicated: over the number of devices that minimizes each one's cache, and of those the
    one with the least padding. The remaining devices shard experts, or else weights."""
    if training:
        return f"fsdp={devices}"

    def cost(parts: int) -> tuple[int, int]:
        heads = pad_config_over(config, parts).num_key_value_heads
        return heads // parts, heads

    heads = min((parts for parts in range(1, devices + 1) if devices % parts == 0), key=cost)
    rest = devices // heads
    sizes = {"expert" if config.num_experts and config.num_experts % rest == 0 else "fsdp": rest, "tensor": heads}
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "fsdp=1"
