"""From slices of a checkpoint's files to MLX arrays.

Safetensors are mapped lazily: several threads check each tensor for NaN, and it is read into its array on first use.
`mx.load` cannot read PyTorch files, some GGUF files, or any file with a float64 tensor, and a lazy cast would hold
every tensor twice: those tensors are read and cast one at a time. A layer's experts are read and stacked, one of
their three matrices at a time. Peak memory is the weights plus one tensor, or one such stack.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from minicpm_data.arguments import check_path, named_keywords
from minicpm_data.generation.adapters import read_adapters
from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
from minicpm_mlx import device
from minicpm_mlx.model import Model
from minicpm_mlx.quantization.model import head_layout, packed_layouts, quantize_model, with_layouts
from minicpm_mlx.training.adapters import attach, attach_rows, cache_dora_ratios, from_adapter
from weights_io.adapters import read_adapter
from weights_io.casting import check_bits, check_head_bits
from weights_io.checkpoint import Checkpoint, open_model
from weights_io.config_keys import note_sparse
from weights_io.errors import InputError
from weights_io.files.tensor import FileTensor
from weights_io.files.threaded_reader import check_all_finite
from weights_io.memory import check_weights, packed_bytes, weight_bytes
from weights_io.parameters import parameters
from weights_io.progress import reading, waiting
from weights_io.quantization.affine import Layout, affine, kept_bytes, note_dequantized
from weights_io.quantization.lookup import lookup

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
        decoding: return the form that generates fastest but is not to be trained: layers with the same input are fused.
        quantize_head: False keeps the head unquantized, to train adapters.
        head_bits: 8 quantizes the head, and with it a tied embedding; also of a checkpoint whose layers stay quantized.
        dequantize: hold the matrices of a quantized checkpoint in ``dtype``, to train them; otherwise they stay
            quantized.
        adapters: folder with a folder for each adapter; each request to an engine chooses one.
        remedy: what an error advises if the weights do not fit into memory; None: fewer bits, or a smaller model.

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
    model = load_weights(checkpoint, dtype, **how, dequantize=dequantize, remedy=remedy)
    if found is not None:
        model = cache_dora_ratios(attach(model, from_adapter(checkpoint.config, found), found.config.scale))
    if several is not None:
        model = attach_rows(model, *several)
    with waiting("arranging the weights"):
        return device.for_decoding(model) if decoding else model, tokenizer


def load_weights(
    checkpoint: Checkpoint,
    dtype: str | Callable[[Checkpoint], str] | None = None,
    *,
    quantize: int | None = None,
    quantize_head: bool = True,
    head_bits: int | None = None,
    dequantize: bool = False,
    remedy: str | None = None,
) -> Model:
    """The model of an open checkpoint, every weight checked and mapped, or read; other arguments as in `load`."""
    note_sparse(checkpoint.raw_config)
    target, config = checkpoint.target(dtype), checkpoint.config
    model = Model(config, checkpoint.eos_token_ids)
    layouts = {} if dequantize or quantize is not None else packed_layouts(checkpoint)
    head = {} if check_head_bits(head_bits) is None else head_layout(config)
    if quantize is None:
        kind, needed = target, weight_bytes(config, target)
        if layouts or head:
            kind, needed = "quantized", kept_bytes(checkpoint, head | layouts, target)
            model = with_layouts(model, head | layouts)
        if not dequantize:
            named = [p.mlx_names(config).items() for p in parameters(config)]
            note_dequantized(
                checkpoint, {each for pairs in named for name, own in pairs if name in layouts for each in own}
            )
    else:
        kind, needed = f"int{check_bits(quantize)}", packed_bytes(config, target, quantize, quantize_head)
        model = quantize_model(
            model, quantize, quantize_head or bool(head)
        )  # the lazy initial weights are never computed
    check_weights(kind, needed, device.free_memory(), remedy)
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if hasattr(layer, "group_size")}
    mapped = _mapped(checkpoint, target)
    leaves: dict[str, mx.array] = {}
    with reading(checkpoint) as checkpoint:
        check_all_finite(checkpoint, mapped, target)
        for parameter in parameters(checkpoint.config):
            for name, tensors in parameter.mlx_names(checkpoint.config).items():
                if name in layouts:
                    leaves |= _packed(
                        checkpoint, name, tensors, target, layers[name], layouts[name], parameter.per_expert
                    )
                    continue
                arrays = [_read(checkpoint, tensor, target, mapped) for tensor in tensors]
                array = _stacked(arrays) if parameter.per_expert else arrays.pop()
                leaves |= _quantized(name, array, layers[name]) if name in layers else {name: array}
                del array  # free it before the next one is read
    model.load_weights(list(leaves.items()))
    return model.eval()


def _mapped(checkpoint: Checkpoint, dtype: str) -> dict[str, mx.array]:
    """Lazy arrays of the tensors already stored in ``dtype``, from safetensors files that MLX can read."""
    arrays: dict[str, Any] = {}
    for source in {tensor.source for tensor in checkpoint.tensors.values() if tensor.source.suffix == ".safetensors"}:
        with contextlib.suppress(RuntimeError):  # a dtype that MLX does not have
            found: Any = mx.load(str(source))
            arrays |= found
    plain = {name: tensor for name, tensor in checkpoint.tensors.items() if isinstance(tensor, FileTensor)}
    return {name: arrays[name] for name, x in plain.items() if name in arrays and x.dtype.name == dtype}


def _quantized(name: str, weight: mx.array, layer: Any) -> dict[str, mx.array]:
    """The arrays of a quantized layer, evaluated at once: otherwise MLX would keep ``weight`` alive."""
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, layer.group_size, layer.bits), strict=True))
    mx.eval(*parts.values())
    mx.clear_cache()
    return {f"{name.removesuffix('weight')}{part}": array for part, array in parts.items()}


def _packed(
    checkpoint: Checkpoint, name: str, tensors: Sequence[str], dtype: str, layer: Any, layout: Layout, stacked: bool
) -> dict[str, mx.array]:
    """The arrays of a quantized layer, from ``tensors`` that are quantized in the files (``stacked``: experts)."""
    parts: dict[str, list[mx.array]] = {}
    orders: list[np.ndarray | None] = []
    for tensor in tensors:
        packed = checkpoint.packed(tensor)
        assert packed is not None
        orders.append(packed.order)
        if layout.table is None:
            arrays = affine(packed, layout.group_size, dtype)
        else:
            arrays = lookup(packed, layout.bits, dtype)
        for part, values in arrays.items():
            if part in ("scales", "biases"):
                checkpoint.check(tensor, dtype, values)
            parts.setdefault(part, []).append(_array(values))
    if layout.reordered:
        inputs = np.arange(checkpoint.tensors[tensors[0]].shape[1])
        each = [inputs if order is None else order for order in orders]
        layer.set_order(np.stack(each) if stacked else each[0])
    found = {part: mx.stack(each) if stacked else each[0] for part, each in parts.items()}
    mx.eval(*found.values())
    mx.clear_cache()
    stem = name.removesuffix("weight")
    return {f"{stem}{part}": array for part, array in found.items()}


def _stacked(arrays: list[mx.array]) -> mx.array:
    """Stack E arrays to [E, ...]; the list is cleared."""
    stacked = mx.stack(arrays)
    arrays.clear()
    mx.eval(stacked)
    mx.clear_cache()
    return stacked


def _read(checkpoint: Checkpoint, name: str, dtype: str, mapped: dict[str, mx.array]) -> mx.array:
    """Read one tensor of the files."""
    if name in mapped:
        return mapped.pop(name)  # pop: otherwise stacked tensors stay in memory
    array = _array(checkpoint.read(name, dtype)).astype(getattr(mx, dtype))
    mx.eval(array)
    mx.clear_cache()  # otherwise MLX keeps the buffer of the cast
    return array


def _array(data: np.ndarray) -> mx.array:
    """bfloat16 is passed as bits; MLX has no float64 on a GPU."""
    if data.dtype.name == "bfloat16":
        return mx.array(data.view(np.uint16)).view(mx.bfloat16)
    return mx.array(data.astype(np.float32) if data.dtype == np.float64 else data)
