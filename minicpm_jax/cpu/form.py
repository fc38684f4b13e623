"""The form of a model that decodes fastest on a CPU, behind one hook: `form_of` and `form_of_model`.

It has one array per layer (XLA:CPU reads them three times as fast as slices of a stacked array), weights with the
products of `cpu.products` and `cpu.packed`, keys and values in float32, and bfloat16 if a matrix unit makes it fast.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from minicpm_jax.cpu.packed import CpuQuantizedEmbedding, CpuQuantizedWeight, CpuTableWeight, on_cpu
from minicpm_jax.cpu.products import Bfloat16Bits, CpuMatrix
from minicpm_jax.layers.kv_cache import Cache
from minicpm_jax.layers.linear import Embedding, Linear
from minicpm_jax.layers.moe import ExpertLinear
from minicpm_jax.layers.rope import Positions
from minicpm_jax.layers.stack import Ran
from minicpm_jax.model import Model
from minicpm_jax.parallel.chips import platform
from weights_io.checkpoint import Checkpoint
from weights_io.config import ModelConfig
from weights_io.parameters import parameters

Packing = Mapping[str, Callable[[Array], Any]]  # parameter name -> function that packs its tensors


class Form:
    """The form of a model that is trained, runs over a mesh, or runs on an accelerator: as it was loaded."""

    def dtype(self, checkpoint: Checkpoint) -> str | None:
        """The default dtype of the computation; None: the device's usual one."""
        return None

    def matrices_dtype(self, checkpoint: Checkpoint, dtype: str) -> str:
        """The dtype of the matrices of a model that computes in ``dtype``."""
        return dtype

    def packing(self, config: ModelConfig, packs: Packing) -> Packing:
        """The functions that pack weights as they are loaded, from those of `quantization.model.packing`."""
        return packs

    def cache_dtype(self, model: Model) -> Any:
        """The dtype of keys and values."""
        return model.model.norm.weight.dtype

    def of(self, model: Model) -> Model:
        """The model in this form; the argument is consumed."""
        return model


class CpuForm(Form):
    """The form of a model that decodes on a CPU."""

    def dtype(self, checkpoint: Checkpoint) -> str | None:
        """bfloat16 on a CPU with a bfloat16 matrix unit (AMX): 1.7 times the tokens per second, and prompts 2.5
        times as fast. Not with experts, whose weights XLA would copy for each token."""
        fast = checkpoint.dtype == "bfloat16" and not checkpoint.config.num_experts and has_matrix_unit()
        return "bfloat16" if fast else None

    def matrices_dtype(self, checkpoint: Checkpoint, dtype: str) -> str:
        """bfloat16 for a float32 model whose file holds bfloat16: `linear_on_cpu` with a matrix unit and `Bfloat16Bits`
        without one lose nothing. Experts are float32: their product slices one expert of a stacked array."""
        exact = all(tensor.dtype.name == "bfloat16" for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1)
        kept = dtype == "float32" and exact and not checkpoint.config.num_experts
        return "bfloat16" if kept else dtype

    def packing(self, config: ModelConfig, packs: Packing) -> Packing:
        """Convert weights to this form before the layers are stacked: a stacked 4-bit integer would take a byte."""

        def packed(pack: Callable[[Array], Any], weight: Array) -> Any:
            return on_cpu(pack(weight))

        alone = {p.name for p in parameters(config) if not p.per_expert}
        return {name: functools.partial(packed, pack) if name in alone else pack for name, pack in packs.items()}

    def cache_dtype(self, model: Model) -> Any:
        """float32: XLA would copy a whole bfloat16 cache to write one slot."""
        return jnp.float32

    def of(self, model: Model) -> Model:
        return unstack_layers(model, donate=True)


def form_of(decoding: bool, mesh: Mesh | None) -> Form:
    """The form of a model to be loaded, for ``decoding`` or training, with or without a ``mesh``."""
    return CpuForm() if decoding and mesh is None and platform() == "cpu" else Form()


def form_of_model(model: Model) -> Form:
    """The form that a model has."""
    return CpuForm() if isinstance(model.model.layers, Layers) else Form()


def for_decoding(model: Model) -> Model:
    """The model in the form that decodes fastest here; the argument is consumed."""
    return form_of(True, model.mesh).of(model)


class Layers(nnx.List):
    """Unstacked layers, each with its own arrays, that run one after the other."""

    def run_layers(self, x: Float[Array, "B T D"], positions: Positions, cache: Cache | None) -> Ran:
        """Like `layers.stack.run_layers`."""
        positions, each = _materialize(positions), []
        for index, layer in enumerate(self):
            x, cache, aux_loss = layer(x, positions, cache, index)
            each.append(aux_loss)
        return x, cache, jnp.mean(jnp.stack(each))


def _materialize(positions: Positions) -> Positions:
    """The same positions as products with an identity matrix, which are exact and which XLA:CPU evaluates once.
    Without a loop over layers it would otherwise compute sines and cosines in each layer, for each of its heads."""
    ones = jnp.eye(positions.cos.shape[-1])
    cos, sin = (jnp.matmul(x, ones, precision=jax.lax.Precision.HIGHEST) for x in (positions.cos, positions.sin))
    return dataclasses.replace(positions, cos=cos, sin=sin)


def unstack_layers(model: Model, donate: bool = False) -> Model:
    """The same weights with one array per layer. They share the memory of the stacked arrays; only layers that are
    not aligned to 64 bytes are copied. ``donate``: delete the given model's layers, one stacked array at a time. An
    unstacked model is returned unchanged."""
    if isinstance(model.model.layers, Layers):
        return model
    leaves, form = jax.tree.flatten(model.model.layers)
    depth = model.config.num_hidden_layers
    each: list[list[Array]] = [[] for _ in range(depth)]
    for leaf in leaves:
        stacked, place = np.asarray(leaf), next(iter(leaf.devices()))
        for layer, own in zip(each, stacked, strict=True):
            layer.append(jax.device_put(own, place))
        if donate:
            leaf.delete()
    copy = jax.tree.map(lambda x: x, model)
    copy.model.layers = Layers([jax.tree.unflatten(form, layer) for layer in each])
    computes_in = copy.model.norm.weight.dtype
    return jax.tree.map(
        lambda part: _converted(part, computes_in), copy, is_leaf=lambda part: isinstance(part, MATRICES)
    )


MATRICES = Linear, Embedding, ExpertLinear


def _converted(part: Any, computes_in: Any) -> Any:
    """A layer with its weight in the CPU form, in a model that computes in the dtype ``computes_in``."""
    if isinstance(part, MATRICES):
        weight = part.weight if isinstance(part, ExpertLinear) else on_cpu(part.weight)
        narrow = isinstance(weight, nnx.Param) and weight.dtype == jnp.bfloat16 and computes_in == jnp.float32
        if narrow and not has_matrix_unit():
            part.weight = Bfloat16Bits(weight[...])
        elif isinstance(weight, CpuQuantizedWeight | CpuTableWeight | CpuQuantizedEmbedding):
            part.weight = weight
        else:
            part.weight = CpuMatrix(weight)
    return part


def has_matrix_unit() -> bool:
    """Whether this CPU has a bfloat16 matrix unit (AMX)."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text().split()
    except OSError:  # not Linux
        return False
