"""Present the tensors of a quantized folder to a loader: one `PackedTensor` per matrix, under the weight's name."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from weights_io.config import ModelConfig
from weights_io.errors import InputError, listed, short
from weights_io.files.json_text import read_optional_json
from weights_io.files.tensor import FileTensor, LazyTensor, same_numbers
from weights_io.parameters import EMBEDDING, HEAD, module_name, parameters, tensor_shapes
from weights_io.quantization import awq, bitsandbytes, gptq, mlx_affine
from weights_io.quantization.entries import (
    BEFORE_MARLIN,
    LABELS,
    SIDE_FILE,
    Scheme,
    reconciled,
    scheme_of_config,
    scheme_of_side_file,
)
from weights_io.quantization.packed import PackedTensor
from weights_io.quantization.parts import check_complete

FORMATS: dict[str, ModuleType] = {"gptq": gptq, "awq": awq, "bitsandbytes": bitsandbytes, "mlx": mlx_affine}
WHOLE = frozenset({"weight", "bias"})  # the parts of an unquantized module


def as_matrices(
    config: ModelConfig, raw: Mapping[str, Any], tensors: Mapping[str, LazyTensor], folder: Path
) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Replace the parts of each packed matrix by one `PackedTensor`.

    Arguments:
        config: the folder's config.
        raw: the contents of config.json.
        tensors: the tensors in the files.
        folder: the model folder.

    Returns:
        The config and the tensors. The config becomes untied where config.json does not state tie_word_embeddings (as
        in quantizations of MiniCPM-2B) and the stored head differs from the embedding.

    Raises:
        InputError: config.json, quantize_config.json and the tensors contradict each other, or parts are missing.
    """
    scheme = scheme_of_config(raw, str(folder / "config.json"))
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    shapes = {module_name(name): shape for name, shape in tensor_shapes(untied) if len(shape) == 2}
    tensors = dict(tensors)
    if scheme is not None and scheme.method == "mlx":
        scheme = _experts_apart(config, scheme, tensors)
    modules = _parts(tensors, shapes)
    packed = {name: parts for name, parts in modules.items() if parts.keys() - WHOLE}
    if packed:
        settings = read_optional_json(folder / SIDE_FILE)
        scheme = reconciled(scheme, scheme_of_side_file(settings, str(folder / SIDE_FILE)))
    if scheme is None:
        if packed:
            raise InputError(
                f"{folder} holds {len(packed)} packed matrices ({listed(packed)}), and neither config.json nor "
                f"{SIDE_FILE} says how they are packed; download both again."
            )
        return config, tensors
    if not packed:
        raise InputError(
            f"{scheme.source} says that the weights are packed ({LABELS[scheme.method]}), and none is; remove the key "
            "if they are whole."
        )
    _check_modules(scheme, shapes, packed)
    for name, parts in packed.items():
        for part in parts:
            del tensors[f"{name}.{part}"]
        tensors[f"{name}.weight"] = _open(name, parts, shapes[name], scheme)
    if "tie_word_embeddings" not in raw and config.tie_word_embeddings and HEAD.hf_name in tensors:
        embedding = tensors.get(EMBEDDING.hf_name)
        if embedding is not None and same_numbers(embedding, tensors[HEAD.hf_name]):
            del tensors[HEAD.hf_name]  # equal to the embedding: the config stays tied
        else:
            config = untied
    return config, tensors


def _open(name: str, parts: dict[str, LazyTensor], shape: tuple[int, ...], scheme: Scheme) -> PackedTensor:
    form = FORMATS[scheme.method]
    if parts.keys() >= {"B", "s"}:
        raise InputError(f"{short(name)} in {parts['B'].source} {BEFORE_MARLIN}.")
    if scheme.method != "bitsandbytes":  # its parts depend on the quantization state
        check_complete(name, parts, form.REQUIRED, form.OPTIONAL, LABELS[scheme.method])
    return form.open_tensor(name, parts, shape, scheme)


def _parts(tensors: Mapping[str, LazyTensor], shapes: Mapping[str, object]) -> dict[str, dict[str, LazyTensor]]:
    """Module name -> part name -> tensor, for the modules in ``shapes``."""
    found: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        module = name
        while module and module not in shapes:
            module = module.rpartition(".")[0]
        if module and module != name:
            found.setdefault(module, {})[name[len(module) + 1 :]] = tensor
    return found


def _check_modules(scheme: Scheme, shapes: Mapping[str, object], packed: Mapping[str, object]) -> None:
    """Raises `InputError` where MLX's config names a module that is no matrix of the model, or is not packed."""
    for name, how in scheme.modules.items():
        if name not in shapes:
            raise InputError(f"{scheme.source} names {short(name)}, which is no matrix of the model; remove the key.")
        if how is not None and name not in packed and name != module_name(HEAD.hf_name):  # a tied head is not stored
            raise InputError(
                f"{scheme.source} says that {short(name)} is packed, and the file holds it whole; remove the key."
            )


def _experts_apart(config: ModelConfig, scheme: Scheme, tensors: dict[str, LazyTensor]) -> Scheme:
    """Split mlx_lm's stacked experts into one tensor per expert.

    mlx_lm saves the experts of a layer stacked, as its model holds them. ``tensors`` is changed in place; the returned
    scheme names the experts one by one.
    """
    modules = dict(scheme.modules)
    for parameter in parameters(config):
        for name, experts in parameter.mlx_names(config).items() if parameter.per_expert else ():
            stack = module_name(name)
            if stack in modules:
                how = modules.pop(stack)
                modules |= {module_name(expert): how for expert in experts}
            for part in (*mlx_affine.REQUIRED, *mlx_affine.OPTIONAL):
                tensor = tensors.get(f"{stack}.{part}")
                if not isinstance(tensor, FileTensor) or len(tensor.shape) != 3 or tensor.shape[0] != len(experts):
                    continue
                del tensors[f"{stack}.{part}"]
                step = tensor.strides[0] * tensor.dtype.itemsize
                for i, expert in enumerate(experts):
                    tensors[f"{module_name(expert)}.{part}"] = dataclasses.replace(
                        tensor, offset=tensor.offset + i * step, shape=tensor.shape[1:], strides=tensor.strides[1:]
                    )
    return dataclasses.replace(scheme, modules=modules)
