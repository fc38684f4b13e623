"""Logical axes of the parameter table to mesh axes."""

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
from minicpm_jax.parallel.mesh import BATCH, make_mesh, row_axes, rows_split
from weights_io.casting import GROUPS
from weights_io.config import ModelConfig
from weights_io.parameters import parameters

# Logical axis -> mesh axis. Matrices are split over fsdp along the hidden size and over tensor along the other one;
# the router is small and every device sends its own tokens; of norms' few numbers the gathering took longer.
RULES = {
    "vocab": "tensor",
    "embed": "fsdp",
    "norm": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "router": None,
    "layers": None,
}


def warn_idle_mesh_axes(config: ModelConfig, mesh: Mesh | None, rows: int) -> None:
    """Say on standard error which axes of a mesh have devices that all do the same while so many rows run together.
    Over an axis that splits weights rows that it does not divide run on all devices, each with its part of those."""
    if mesh is None or jax.process_index() > 0:
        return
    sizes = {name: size for name, size in mesh.shape.items() if size > 1}
    of_weights = {name for sharding in shardings(pad_config(config, mesh), mesh).values() for name in sharding.spec}
    of_rows = row_axes(mesh, rows)
    whole = [n for n in BATCH if n in sizes and n not in of_rows and n not in of_weights]
    if whole:
        over = ",".join(f"{name}={sizes[name]}" for name in whole)
        what = "1 row" if rows == 1 else f"{rows} rows together"
        remedy = f"a multiple of {rows_split(mesh)} rows would be split"
        print(f"note: {what} cannot be split over {over}, whose devices all run the same; {remedy}", file=sys.stderr)
    for name in [n for n in sizes if n not in BATCH and n not in of_weights]:
        what = f"{name}={sizes[name]} splits none of this model's weights"
        print(f"note: {what}, and its devices all run the same; take another axis", file=sys.stderr)


def pad_config(config: ModelConfig, mesh: Mesh | None, packed: bool = False) -> ModelConfig:
    """The shape in which a model lies on a mesh: what is split over tensor is filled up, with zeros at its end, to what
    tensor divides. ``packed``: its matrices are in few bits.

    Zeros add nothing: a head of zeros mixes values of zero, whose columns in ``o_proj`` are zero, a gate of zero is
    shut, and the words that are none are cut off (`Model.head`) or weigh nothing (`cross_entropy`). So all gradients
    there are zero, too."""
    parts = 1 if mesh is None else mesh.shape.get("tensor", 1)
    tpu = mesh is not None and mesh.devices.flat[0].platform == "tpu"
    return pad_config_over(config, parts, LANES if tpu else 1, packed)


def pad_config_over(config: ModelConfig, parts: int, lanes: int = LANES, packed: bool = False) -> ModelConfig:
    """`pad_config`, over so many ``parts``. Key/value heads come with the query heads that read them. Those of a device
    fill whole registers of ``lanes``: of a cache with 9 heads of 64 XLA would keep the axes in another order, and copy
    it for the kernel; in rows it takes as much room as one with 10. So do the neurons of what is ``packed``, which are
    whole groups besides: of 720 neurons of the 2B a device XLA would copy all layers in each step."""
    if parts == 1:
        return config
    neurons = parts * math.lcm(lanes, GROUPS[0]) if packed else parts
    heads = _multiple(config.num_key_value_heads, parts * lanes // math.gcd(lanes, config.head_dim))
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
    """Each axis cut off at its end, or filled up there with zeros."""
    if x.shape == shape:
        return x
    x = x[tuple(slice(size) for size in shape)]
    more = [(0, wanted - size) for size, wanted in zip(x.shape, shape, strict=True)]
    return (np if isinstance(x, np.ndarray) else jnp).pad(x, more)


def pad_or_trim_params(weights: Mapping[str, Any], config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Parameters `pad_or_trim` to the shapes of a config (a model's own, or that of `pad_config`), where those lie."""
    where = shardings(config, mesh)
    changed = {p.name: p.shape(config) for p in parameters(config) if weights[p.name].shape != p.shape(config)}
    made = {
        name: jax.jit(pad_or_trim, static_argnums=1, out_shardings=where[name])(weights[name], shape)
        for name, shape in changed.items()
    }
    return {**weights, **made}


def shardings(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """Of every parameter of the table; with the config of `pad_config`, of every one of a model on the mesh."""
    return {
        p.name: NamedSharding(mesh, partition_spec(p.logical_axes(), p.shape(config), mesh)) for p in parameters(config)
    }


def fraction_per_device(config: ModelConfig, mesh: Mesh | None) -> float:
    """How much of all weights of these shapes each device has."""
    if mesh is None:
        return 1.0
    where = shardings(config, mesh)
    here = sum(math.prod(where[p.name].shard_shape(p.shape(config))) for p in parameters(config))
    return here / sum(math.prod(p.shape(config)) for p in parameters(config))


def replicated(tree: Any, mesh: Mesh) -> Any:
    """The arrays, whole on every device. `device_put` would end a run whose processes have not the same, before it can
    be said what they have not (`hosts.Together.check_same`)."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)
    tree = jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index]), tree)


def partition_spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The mesh axis of each dimension. A dimension that its mesh axis does not divide stays whole."""
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        name = RULES[axis]
        spec.append(name if splits(name, size, mesh) else None)
    return PartitionSpec(*spec)


def splits(name: str | None, size: int, mesh: Mesh | AbstractMesh) -> bool:
    """Whether the mesh has that axis and it divides a dimension of that size."""
    return name in mesh.shape and size % mesh.shape[name] == 0


def serving_mesh(config: ModelConfig, given: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh to generate on, by `default_mesh`, over the ``given`` devices (None: all there are); None: a single one
    needs none. `loading.load` takes this function as its ``mesh``."""
    devices = jax.device_count() if given is None else len(given)
    return None if devices == 1 else make_mesh(default_mesh(config, devices, training=False), given)


def default_mesh(config: ModelConfig, devices: int, training: bool) -> str:
    """Training splits rows and weights alike. Generation splits heads, so that nothing but activations travels: over as
    many devices as leave each the least of the cache, and of those as few as fill up the fewest heads; what is left of
    the devices splits experts, or the weights."""
    if training:
        return f"fsdp={devices}"

    def cost(parts: int) -> tuple[int, int]:
        heads = pad_config_over(config, parts).num_key_value_heads
        return heads // parts, heads

    heads = min((parts for parts in range(1, devices + 1) if devices % parts == 0), key=cost)
    rest = devices // heads
    sizes = {"expert" if config.num_experts and config.num_experts % rest == 0 else "fsdp": rest, "tensor": heads}
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "fsdp=1"
