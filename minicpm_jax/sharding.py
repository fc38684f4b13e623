"""Logical axes of the parameter table to mesh axes."""

import bisect
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from minicpm_jax.kernels.cache_attention import LANES
from weights_io.casting import GROUPS
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.parameters import parameters

AXES = ("data", "fsdp", "tensor", "expert")  # of a mesh; data splits batches, and no weights
BATCH = ("data", "fsdp")  # what a batch's rows are split over

ADDED_UP = "added up over tensor"  # the name of what is kept of a layer that the backward pass runs again

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
            raise InputError(f"--mesh {text} is not of the form fsdp=4,tensor=2; the axes are {', '.join(AXES)}.")
        sizes[name] = int(size)
    if math.prod(sizes.values()) != devices:
        raise InputError(f"--mesh {text} is for {math.prod(sizes.values())} devices; there are {devices}.")
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=given)


def batch_sharding(mesh: Mesh, rows: int, flag: str = "--batch-size") -> NamedSharding:
    """Of arrays [A, B, ...] whose B ``rows`` are split over the mesh. Raises `InputError`, which names the ``flag``,
    where they cannot be."""
    names = tuple(name for name in BATCH if name in mesh.shape)
    parts = math.prod(mesh.shape[name] for name in names)
    if rows % parts:
        raise InputError(f"{flag} {rows} does not divide over the {parts} devices of {' and '.join(names)}.")
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


def by_rows(x: Any, mesh: Mesh | None) -> Any:
    """[B, ...] with its rows over the axes of batches, whole otherwise; as it is where none divides it. Without this
    XLA splits the hidden state as the weights are, every device then runs all rows, and sums travel in place of
    weights: 15 times the bytes of a step of MiniCPM-2B over 8 devices."""
    if mesh is None or not row_axes(mesh, len(x)):
        return x
    return _split(x, mesh, row_axes(mesh, len(x)))


def by_heads(x: Any, mesh: Mesh | None) -> Any:
    """[B, T, NH] as `by_rows`, and its heads over tensor. XLA would make the heads an axis of the projection, and
    gather [N, H, D] anew in the backward pass, where an H of 64 fills 128 lanes: 0.4 GB of 6 of MiniCPM-1B over 8."""
    if mesh is None or not row_axes(mesh, len(x)):
        return x
    return _split(x, mesh, row_axes(mesh, len(x)), None, "tensor" if splits("tensor", x.shape[-1], mesh) else None)


def gathered_rows(x: Any, mesh: Mesh | None) -> Any:
    """`by_tokens` by way of all rows on every device: what is split along its last axis comes by an all-gather, which
    runs beside arithmetic; from the one split to the other it would be an all-to-all."""
    if mesh is None:
        return x
    return by_tokens(_split(x, mesh, None, "tensor" if splits_tokens(x, mesh) else None), mesh)


def by_tokens(x: Any, mesh: Mesh | None) -> Any:
    """[B, T, ...] as `by_rows`, and its tokens over tensor where that divides them: between the blocks, where every
    device of tensor would hold, and add up, the same (Megatron's sequence parallelism, arXiv 2205.05198)."""
    if mesh is None or not splits_tokens(x, mesh):
        return by_rows(x, mesh)
    return _split(x, mesh, row_axes(mesh, len(x)), "tensor")


def gathered_tokens(x: Any, mesh: Mesh | None) -> Any:
    """From `by_tokens` to `by_rows`, where a block begins. Either way both are named, so that an all-gather's gradient
    is a reduce-scatter: XLA would carry the one split into the block's gradients, by all-to-alls."""
    return by_rows(by_tokens(x, mesh), mesh) if splits_tokens(x, mesh) else x


def scattered_tokens(x: Any, mesh: Mesh | None) -> Any:
    """From `by_rows` to `by_tokens`, where a block ends: its sums over tensor by a reduce-scatter, which has the name
    by which a backward pass that runs the block again finds what came of it."""
    return checkpoint_name(by_tokens(by_rows(x, mesh), mesh), ADDED_UP) if splits_tokens(x, mesh) else x


def copies(weight: Any, x: Any, mesh: Mesh) -> Any:
    """[L, D] as [L, P, Q, D]: a copy for each device that `by_tokens` gives rows and tokens of ``x`` [B, T, D] of its
    own. A gradient then stays on its device until the layers are done, and all are added up at once, in float32."""
    names, tokens = row_axes(mesh, len(x)), splits_tokens(x, mesh)
    parts = math.prod(mesh.shape[name] for name in names), mesh.shape["tensor"] if tokens else 1
    depth, width = weight.shape
    wide = jnp.broadcast_to(weight.astype(jnp.float32)[:, None, None], (depth, *parts, width))
    return _split(wide, mesh, None, names, "tensor" if tokens else None).astype(weight.dtype)


def _split(x: Any, mesh: Mesh, *axes: Any) -> Any:
    """Its first axes over these of the mesh, whole otherwise."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


def splits_tokens(x: Any, mesh: Mesh | None) -> bool:
    """Whether the mesh has an axis tensor that divides the T of [B, T, ...], while its other axes divide the rows."""
    if mesh is None or not splits("tensor", x.shape[1], mesh):
        return False
    return row_axes(mesh, len(x)) == tuple(name for name in BATCH if name in mesh.shape)


def row_axes(mesh: Mesh, rows: int) -> tuple[str, ...]:
    """The axes that split a batch of so many rows, as far as they divide it."""
    names: tuple[str, ...] = ()
    for name in BATCH:
        if name in mesh.shape and rows % math.prod(mesh.shape[n] for n in (*names, name)) == 0:
            names = *names, name
    return names


def rows_split(mesh: Mesh | None) -> int:
    """Over how many parts a batch's rows are split."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in BATCH if name in mesh.shape)


def note_idle(config: ModelConfig, mesh: Mesh | None, rows: int) -> None:
    """Say on standard error which axes of a mesh have devices that all do the same while so many rows run together.
    Over an axis that splits weights rows that it does not divide run on all devices, each with its part of those."""
    if mesh is None or jax.process_index() > 0:
        return
    sizes = {name: size for name, size in mesh.shape.items() if size > 1}
    of_weights = {name for sharding in shardings(padded(config, mesh), mesh).values() for name in sharding.spec}
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


def padded(config: ModelConfig, mesh: Mesh | None, packed: bool = False) -> ModelConfig:
    """The shape in which a model lies on a mesh: what is split over tensor is filled up, with zeros at its end, to what
    tensor divides. ``packed``: its matrices are in few bits.

    Zeros add nothing: a head of zeros mixes values of zero, whose columns in ``o_proj`` are zero, a gate of zero is
    shut, and the words that are none are cut off (`Model.head`) or weigh nothing (`losses`). So all gradients there are
    zero, too."""
    parts = 1 if mesh is None else mesh.shape.get("tensor", 1)
    tpu = mesh is not None and mesh.devices.flat[0].platform == "tpu"
    return padded_over(config, parts, LANES if tpu else 1, packed)


def padded_over(config: ModelConfig, parts: int, lanes: int = LANES, packed: bool = False) -> ModelConfig:
    """`padded`, over so many ``parts``. Key/value heads come with the query heads that read them. Those of a device
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


def resized(x: Any, shape: tuple[int, ...]) -> Any:
    """Each axis cut off at its end, or filled up there with zeros."""
    if x.shape == shape:
        return x
    x = x[tuple(slice(size) for size in shape)]
    more = [(0, wanted - size) for size, wanted in zip(x.shape, shape, strict=True)]
    return (np if isinstance(x, np.ndarray) else jnp).pad(x, more)


def reshaped(weights: Mapping[str, Any], config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Parameters `resized` to the shapes of a config (a model's own, or that of `padded`), where those lie."""
    where = shardings(config, mesh)
    changed = {p.name: p.shape(config) for p in parameters(config) if weights[p.name].shape != p.shape(config)}
    made = {
        name: jax.jit(resized, static_argnums=1, out_shardings=where[name])(weights[name], shape)
        for name, shape in changed.items()
    }
    return {**weights, **made}


def shardings(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """Of every parameter of the table; with the config of `padded`, of every one of a model on the mesh."""
    return {
        p.name: NamedSharding(mesh, partition_spec(p.logical_axes(), p.shape(config), mesh)) for p in parameters(config)
    }


def share(config: ModelConfig, mesh: Mesh | None) -> float:
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


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with axes along which XLA finds the shardings of a program; those of `jax.make_mesh` are explicit.
    Raises `InputError` for axes that are not ours, and for what is no mesh."""
    if not isinstance(mesh, Mesh):
        raise InputError(f"mesh is {mesh!r}; give what minicpm_jax.sharding.make_mesh('fsdp=4,tensor=2') makes.")
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
