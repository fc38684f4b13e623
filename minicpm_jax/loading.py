"""From slices of a checkpoint's files to placed (and, over a mesh, sharded) stacked arrays.

There are three ways. On a CPU the arrays are the buffers that the files were read into (`_read_whole`). For a device
or a mesh the host holds two tensors at a time: each is read, placed and written into its row of the stacked array,
which is donated and so updated in place, while the next one is read (`_placed`). Quantized weights are packed before
they are written there (`_placed_packed`).
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from minicpm_data.arguments import check_path, named_keywords
from minicpm_data.generation.adapters import read_adapters
from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
from minicpm_jax import device
from minicpm_jax.cpu.form import Packing, for_decoding, form_of
from minicpm_jax.model import Model, get_layer, nested
from minicpm_jax.parallel.mesh import MeshChoice, mesh_for
from minicpm_jax.parallel.sharding import fraction_per_device, pad_config, pad_or_trim, partition_spec
from minicpm_jax.quantization.kept import Form as KeptForm
from minicpm_jax.quantization.kept import kept_bytes, kept_forms, kept_rows
from minicpm_jax.quantization.model import axes_of, head_packing, packing
from minicpm_jax.quantization.packed import in_tiles
from minicpm_jax.training.adapters import attach, attach_rows, from_adapter
from weights_io.adapters import read_adapter
from weights_io.casting import check_bits, check_head_bits
from weights_io.checkpoint import Checkpoint, open_model
from weights_io.config import ModelConfig
from weights_io.config_keys import note_sparse
from weights_io.errors import InputError
from weights_io.files.threaded_reader import read_stacked
from weights_io.memory import check_weights, packed_bytes, weight_bytes
from weights_io.parameters import Parameter, parameters
from weights_io.progress import reading, waiting
from weights_io.quantization.affine import note_dequantized

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer


@named_keywords
def load(
    path_or_repo: str | Path | Checkpoint | None = None,
    dtype: str | Callable[[Checkpoint], str] | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    hub: str = "huggingface",
    quantize: int | None = None,
    *,
    decoding: bool = False,
    quantize_head: bool = True,
    head_bits: int | None = None,
    dequantize: bool = False,
    remedy: str | None = None,
    adapters: str | Path | None = None,
    mesh: MeshChoice = None,
) -> "tuple[Model, Tokenizer | None]":
    """Load a released checkpoint, unmodified.

    Arguments:
        path_or_repo: a folder, a GGUF file, a hub id or a short name of the catalogue; None is the built-in model. Also
            an open checkpoint.
        dtype: float32, bfloat16 or float16, or a function of the checkpoint (`device.preferred_dtype`); None is the
            checkpoint's own.
        adapter: folder with an adapter of PEFT or mlx_lm, which is added to the model's layers.
        revision: branch or commit of the hub.
        hub: huggingface or modelscope.
        quantize: keep the layers' matrices in this many bits (4 or 8) and the head in 8, to generate with less memory.
        decoding: return the form that generates fastest here but cannot be trained: on a CPU one array per layer.
        quantize_head: False keeps the head unquantized, to train adapters.
        head_bits: 8 quantizes the head, and with it a tied embedding; also of a checkpoint whose layers stay quantized.
        dequantize: hold the matrices of a quantized checkpoint in ``dtype``, to train them; otherwise they stay
            quantized.
        adapters: folder with a folder for each adapter; each request to an engine chooses one.
        remedy: what an error advises if the weights do not fit into memory; None: fewer bits, or a smaller model.
        mesh: a `jax.sharding.Mesh` with any of the axes data, fsdp, tensor, expert, or a function that makes one (or
            None) from the model's config (`sharding.serving_mesh`).

    Returns: the model and its tokenizer (None if the folder holds no tokenizer files).

    Raises: `InputError` with one sentence if something cannot be used.
    """
    for name, value in (("path_or_repo", path_or_repo), ("adapter", adapter), ("adapters", adapters)):
        if value is not None and not isinstance(value, Checkpoint):
            check_path(name, value)
    if adapter is not None and adapters is not None:
        raise InputError("does not go with {adapter}; give one of the two.", "adapters", ["adapter"])
    checkpoint = path_or_repo
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_model(checkpoint, revision, hub)
    tokenizer = tokenizer_of(checkpoint)
    found = None if adapter is None else read_adapter(Path(adapter), checkpoint.config)
    several = None if adapters is None else read_adapters(adapters, checkpoint.config)
    how: dict[str, Any] = {"quantize": quantize, "quantize_head": quantize_head, "head_bits": head_bits}
    model = load_weights(checkpoint, dtype, mesh, decoding=decoding, **how, dequantize=dequantize, remedy=remedy)
    if found is not None:
        model = attach(model, from_adapter(checkpoint.config, found), found.config.scale)
    if several is not None:
        model = attach_rows(model, *several)
    with waiting("arranging the weights"):
        return for_decoding(model) if decoding else model, tokenizer


def load_weights(
    checkpoint: Checkpoint,
    dtype: str | Callable[[Checkpoint], str] | None = None,
    mesh: MeshChoice = None,
    *,
    decoding: bool = False,
    quantize: int | None = None,
    quantize_head: bool = True,
    head_bits: int | None = None,
    dequantize: bool = False,
    remedy: str | None = None,
) -> Model:
    """The model of an open checkpoint, each array placed as the mesh requires; other arguments as in `load`.
    ``decoding``: prepare the weights for `cpu.form.for_decoding`."""
    note_sparse(checkpoint.raw_config)
    target = jnp.dtype(checkpoint.target(dtype))
    device.check_dtype(target.name)
    mesh = mesh_for(mesh, checkpoint.config)
    kept = {} if dequantize or quantize is not None else kept_forms(checkpoint)
    config = checkpoint.config
    head = {} if check_head_bits(head_bits) is None else head_packing(config)
    shape = pad_config(config, mesh, packed=quantize is not None or bool(kept))
    form = form_of(decoding, mesh)
    packs: Packing = {}
    if quantize is None and not dequantize:
        named = (p.hf_names(config) for p in parameters(config) if p.name in kept)
        note_dequantized(checkpoint, {name for names in named for name in names})
    if kept or (head and quantize is None):
        kind, needed = "quantized", kept_bytes(checkpoint, kept, target.name, head_bits)
        packs = form.packing(config, head | dict.fromkeys(kept, lambda weight: weight))
    elif quantize is None:
        matrices = form.matrices_dtype(checkpoint, target.name)
        kind, needed = target.name, weight_bytes(shape, matrices)
    else:
        kind, needed = f"int{check_bits(quantize)}", packed_bytes(shape, target.name, quantize, quantize_head)
        packs = form.packing(config, packing(config, quantize, quantize_head) | head)
    check_weights(kind, int(needed * fraction_per_device(shape, mesh)), device.free_memory(mesh), remedy)
    with reading(checkpoint) as checkpoint:
        if not packs and mesh is None and jax.default_backend() == "cpu":
            leaves = _read_whole(checkpoint, target.name, matrices)
        elif not packs:
            leaves = _placed(checkpoint, shape, target, mesh)
        else:
            leaves = _placed_packed(checkpoint, shape, target, mesh, packs, kept)
    model = Model(nested(leaves), config, checkpoint.eos_token_ids, mesh)
    for name in packs:
        get_layer(model, name).weight = leaves[name]
    return model


Leaves = dict[str, Any]  # parameter name -> array, or quantized weight


def _read_whole(checkpoint: Checkpoint, dtype: str, matrices: str) -> Leaves:
    """On a CPU: the arrays are the buffers that the files were read into. ``matrices``: dtype of the matrices."""
    first = jax.devices()[0]
    return {name: jax.device_put(x, first) for name, x in read_stacked(checkpoint, dtype, matrices).items()}


def _placed(checkpoint: Checkpoint, padded_config: ModelConfig, dtype: Any, mesh: Mesh | None) -> Leaves:
    """On a device or over a mesh, in the shapes ``lies_as`` of `pad_config`."""
    return {
        p.name: _stacked(checkpoint, p, padded_config, mesh, _rows(checkpoint, p, padded_config, dtype, mesh))
        for p in parameters(checkpoint.config)
    }


def _placed_packed(
    checkpoint: Checkpoint,
    padded_config: ModelConfig,
    dtype: Any,
    mesh: Mesh | None,
    packs: Mapping[str, Callable],
    kept: Mapping[str, KeptForm],
) -> Leaves:
    """Like `_placed`, with each parameter in ``packs`` packed, one tensor at a time. Those in ``kept`` are quantized in
    the files."""
    leaves = {}
    for p in parameters(checkpoint.config):
        pack, rows = packs.get(p.name), _rows(checkpoint, p, padded_config, dtype, mesh)
        if p.name in kept:
            rows = _kept_rows(checkpoint, p, kept[p.name], padded_config, dtype, mesh)
        rows = rows if pack is None else map(pack, rows)
        if mesh is None and jax.default_backend() == "tpu":
            rows = map(in_tiles, rows)
        leaves[p.name] = _stacked(checkpoint, p, padded_config, mesh, rows)
    return leaves


def _where(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | None) -> Any:
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def _rows(
    checkpoint: Checkpoint, parameter: Parameter, padded_config: ModelConfig, dtype: Any, mesh: Mesh | None
) -> Iterator[jax.Array]:
    """The tensors of a parameter, each read and placed when it is requested."""
    depth, stored = len(parameter.stack(checkpoint.config)), parameter.tensor_shape(checkpoint.config)
    shape = parameter.shape(padded_config)[depth:]
    place = _where(parameter.logical_axes()[depth:], shape, mesh)
    for name in parameter.hf_names(checkpoint.config):
        yield _read(checkpoint, name, stored, shape, dtype, place)


def _kept_rows(
    checkpoint: Checkpoint,
    parameter: Parameter,
    form: KeptForm,
    padded_config: ModelConfig,
    dtype: Any,
    mesh: Mesh | None,
) -> Iterator[Any]:
    """The quantized tensors of a parameter, each read and placed when it is requested."""
    depth = len(parameter.stack(checkpoint.config))
    axes = parameter.logical_axes()[depth:]

    def place(part: str, array: np.ndarray) -> jax.Array:
        where = _where(axes_of((part,), axes, array.ndim), array.shape, mesh)
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    return kept_rows(checkpoint, parameter, form, parameter.shape(padded_config)[depth:], dtype.name, place)


def _stacked(
    checkpoint: Checkpoint, parameter: Parameter, padded_config: ModelConfig, mesh: Mesh | None, rows: Iterator[Any]
) -> Any:
    """Stack a parameter's ``rows`` (arrays, or trees of arrays) over layers and experts, if it has those axes."""
    axes, stack = parameter.logical_axes(), parameter.stack(checkpoint.config)
    if not stack:
        return next(rows)

    def zeros(path: Any, part: jax.Array) -> jax.Array:
        """The stacked array for one leaf of a row."""
        own = (*stack, *part.shape)
        return _zeros(own, part.dtype, _where(axes_of(path, axes, len(own)), own, mesh))

    first = next(rows)
    rows = itertools.chain([first], rows)
    if mesh is None and jax.default_backend() == "cpu" and any(x.dtype == jnp.int4 for x in jax.tree.leaves(first)):
        # XLA:CPU copies the whole stack for each row of int4: 0.84 s for 6 layers of [2048, 5632], 2 ms in int8.
        return jax.tree.map(lambda *parts: _stacked_on_host(parts, stack), *rows)
    whole: list[jax.Array] = []
    for place, row in zip(np.ndindex(*stack), rows, strict=True):
        whole = whole or jax.tree.leaves(jax.tree_util.tree_map_with_path(zeros, row))
        jax.block_until_ready(whole)  # wait until the previous row is written: otherwise rows pile up
        parts, form = jax.tree.flatten(row)
        whole = [_set_row(stacked, part, place, stacked.sharding) for stacked, part in zip(whole, parts, strict=True)]
    return jax.tree.unflatten(form, whole)


def _stacked_on_host(parts: tuple[jax.Array, ...], stack: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.stack([np.asarray(part) for part in parts]).reshape(*stack, *parts[0].shape))


def _read(
    checkpoint: Checkpoint, name: str, stored: tuple[int, ...], shape: tuple[int, ...], dtype: Any, sharding: Any
) -> jax.Array:
    """Read one tensor of stored shape ``stored`` as a placed array, zero-padded to ``shape``.

    Each process reads only the rows that its devices hold, and each row once: in a file, the columns of one device
    are interleaved with those of the others. Of a row it reads the columns that any of its devices needs.
    """

    def spans(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        """Start and end of the stored part of each axis."""
        axes = zip(index, shape, stored, strict=True)
        return tuple((min(s.indices(n)[0], most), min(s.indices(n)[1], most)) for s, n, most in axes)

    own = [spans(index) for index in sharding.addressable_devices_indices_map(shape).values()]
    columns = tuple(
        slice(min(start for start, _ in axis), max(stop for _, stop in axis)) for axis in zip(*own, strict=True)
    )[1:]
    rows: dict[tuple, np.ndarray] = {}
    parts: dict[tuple, np.ndarray] = {}

    def read(key: tuple[tuple[int, int], ...]) -> np.ndarray:
        if any(start == stop for start, stop in key):
            return np.zeros([stop - start for start, stop in key], dtype)
        if key[0] not in rows:
            rows[key[0]] = checkpoint.read(name, dtype.name, (slice(*key[0]), *columns)).astype(dtype, copy=False)
        here = (slice(start - c.start, stop - c.start) for (start, stop), c in zip(key[1:], columns, strict=True))
        return rows[key[0]][(slice(None), *here)]

    def part_of(index: tuple[slice, ...]) -> np.ndarray:
        key = spans(index)
        if key not in parts:  # replicated axes request the same part for each device
            size = tuple(len(range(n)[s]) for s, n in zip(index, shape, strict=True))
            parts[key] = np.ascontiguousarray(pad_or_trim(read(key), size))
        return parts[key]

    return jax.make_array_from_callback(shape, sharding, part_of)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _set_row(stacked: jax.Array, row: jax.Array, place: tuple[int, ...], sharding: Any) -> jax.Array:
    update = row.reshape((1,) * len(place) + row.shape)
    updated = jax.lax.dynamic_update_slice(stacked, update, (*place, *(0,) * row.ndim))
    return jax.lax.with_sharding_constraint(updated, sharding)
