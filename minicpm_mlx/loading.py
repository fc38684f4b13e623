"""From a checkpoint's file slices to MLX arrays.

Safetensors are mapped lazily: each tensor is looked through for NaN, by several threads, and read into its array when
it is first used. `mx.load` reads neither PyTorch's nor all GGUF files, and no file with a float64 tensor in it; casting
lazily would hold every tensor twice: there, one tensor after the other is read and cast. A layer's experts are read and
stacked, one of their three matrices at a time. Peak memory is the weights plus one tensor, or one such stack.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
from minicpm_mlx import device
from minicpm_mlx.adapters import attach, from_adapter, settle
from minicpm_mlx.model import Model
from minicpm_mlx.quantization.model import quantize_model
from weights_io.adapters import read_adapter
from weights_io.casting import check_bits
from weights_io.checkpoint import Checkpoint, open_model
from weights_io.files.memory_reading import look_through
from weights_io.files.tensor import FileTensor
from weights_io.memory import check_weights, packed_bytes, weight_bytes
from weights_io.parameters import parameters
from weights_io.progress import reading

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer


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
    remedy: str | None = None,
) -> "tuple[Model, Tokenizer | None]":
    """Load a released checkpoint as it stands.

    ``path_or_repo``: a folder, a GGUF file, a hub id, a short name of the catalogue; None is the built-in model. Or a
    checkpoint that is open already.
    ``dtype``: float32, bfloat16 or float16, or what says so of a checkpoint (`device.preferred_dtype`); None is the
    checkpoint's own. ``adapter``: a folder with an adapter of PEFT or mlx_lm, which is added to the model's layers.
    ``revision``: a branch or commit of the hub.
    ``quantize``: keep the matrices of the layers in so many bits (4 or 8) and the head in 8, to generate with less; the
    head as it is without ``quantize_head``, to train adapters. ``remedy``: what to do where there is no room for the
    weights (None: fewer bits, or a smaller model).
    ``decoding``: in the form that generates fastest, and is not to be trained: layers that read the same are joined.
    Returns the model and its tokenizer (None where the folder holds no tokenizer files). Raises `InputError` with one
    sentence where something cannot be used.
    """
    checkpoint = path_or_repo
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_model(checkpoint, revision, hub)
    tokenizer = tokenizer_of(checkpoint)
    found = None if adapter is None else read_adapter(Path(adapter), checkpoint.config)
    model = load_weights(checkpoint, dtype, quantize=quantize, quantize_head=quantize_head, remedy=remedy)
    if found is not None:
        model = settle(attach(model, from_adapter(checkpoint.config, found), found.config.scale))
    return device.for_decoding(model) if decoding else model, tokenizer


def load_weights(
    checkpoint: Checkpoint,
    dtype: str | Callable[[Checkpoint], str] | None = None,
    *,
    quantize: int | None = None,
    quantize_head: bool = True,
    remedy: str | None = None,
) -> Model:
    """The model of an opened checkpoint, every weight checked and mapped, or read; the rest as in `load`."""
    target, config = checkpoint.target(dtype), checkpoint.config
    model = Model(config, checkpoint.eos_token_ids)
    if quantize is None:
        kind, needed = target, weight_bytes(config, target)
    else:
        kind, needed = f"int{check_bits(quantize)}", packed_bytes(config, target, quantize, quantize_head)
        model = quantize_model(model, quantize, quantize_head)  # of weights that are never computed
    check_weights(kind, needed, device.free_memory(), remedy)
    packed = {f"{name}.weight": layer for name, layer in model.named_modules() if hasattr(layer, "group_size")}
    mapped = _mapped(checkpoint, target)
    leaves: dict[str, mx.array] = {}
    with reading(checkpoint) as checkpoint:
        look_through(checkpoint, mapped, target)
        for parameter in parameters(checkpoint.config):
            for name, tensors in parameter.layers(checkpoint.config).items():
                arrays = [_read(checkpoint, tensor, target, mapped) for tensor in tensors]
                array = _stacked(arrays) if parameter.of_expert else arrays.pop()
                leaves |= _quantized(name, array, packed[name]) if name in packed else {name: array}
                del array  # what was packed, before the next one is read
    model.load_weights(list(leaves.items()))
    return model.eval()


def _mapped(checkpoint: Checkpoint, dtype: str) -> dict[str, mx.array]:
    """The tensors in ``dtype``, not yet read, of the safetensors files whose dtypes MLX has."""
    arrays: dict[str, Any] = {}
    for source in {tensor.source for tensor in checkpoint.tensors.values() if tensor.source.suffix == ".safetensors"}:
        with contextlib.suppress(RuntimeError):  # a dtype that it has not
            found: Any = mx.load(str(source))
            arrays |= found
    plain = {name: tensor for name, tensor in checkpoint.tensors.items() if isinstance(tensor, FileTensor)}
    return {name: arrays[name] for name, x in plain.items() if name in arrays and x.dtype.name == dtype}


def _quantized(name: str, weight: mx.array, layer: Any) -> dict[str, mx.array]:
    """The arrays of a quantised layer, computed now: else MLX would hold ``weight`` till they are."""
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, layer.group_size, layer.bits), strict=True))
    mx.eval(*parts.values())
    mx.clear_cache()
    return {f"{name.removesuffix('weight')}{part}": array for part, array in parts.items()}


def _stacked(arrays: list[mx.array]) -> mx.array:
    """[E, ...] of E arrays, which are given up."""
    stacked = mx.stack(arrays)
    arrays.clear()
    mx.eval(stacked)
    mx.clear_cache()
    return stacked


def _read(checkpoint: Checkpoint, name: str, dtype: str, mapped: dict[str, mx.array]) -> mx.array:
    """One tensor of the files. bfloat16 goes by its bits; MLX has no float64 on a GPU."""
    if name in mapped:
        return mapped.pop(name)  # else a stacked one would stay
    data = checkpoint.read(name, dtype)
    if data.dtype.name == "bfloat16":
        array = mx.array(data.view(np.uint16)).view(mx.bfloat16)
    else:
        array = mx.array(data.astype(np.float32) if data.dtype == np.float64 else data)
    array = array.astype(getattr(mx, dtype))
    mx.eval(array)
    mx.clear_cache()  # MLX would keep the buffer that was cast
    return array
