"""The form of a model in which a CPU decodes fastest, behind one hook: `form_of` and `form_of_model`.

One array for each layer, which XLA:CPU reads three times as fast as slices of a stacked one; weights that multiply as
`cpu.products` and `cpu.packed` say; keys and values in float32; and bfloat16 where a matrix unit makes it fast.
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

from minicpm_jax.cpu.packed import CpuQuantizedEmbedding, CpuQuantizedWeight, on_cpu
from minicpm_jax.cpu.products import CpuMatrix
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

Packing = Mapping[str, Callable[[Array], Any]]  # parameter name -> what packs its tensors


class Form:
    """That of a model which is trained, runs over a mesh, or on no CPU: it is as it was loaded."""

    def dtype(self, checkpoint: Checkpoint) -> str | None:
        """What to compute in unless told otherwise; None: what is usual on this device."""
        return None

    def matrices_dtype(self, checkpoint: Checkpoint, dtype: str) -> str:
        """In what a model that computes in ``dtype`` keeps its matrices."""
        return dtype

    def packing(self, config: ModelConfig, packs: Packing) -> Packing:
        """How weights are packed as they are loaded; ``packs``: `quantization.model.packing`."""
        return packs

    def cache_dtype(self, model: Model) -> Any:
        """Of keys and values."""
        return model.model.norm.weight.dtype

    def of(self, model: Model) -> Model:
        """The model in this form; the one that was given is used up."""
        return model


class CpuForm(Form):
    """That of a model which decodes on a CPU."""

    def dtype(self, checkpoint: Checkpoint) -> str | None:
        """bfloat16 on a CPU with a matrix unit for it (AMX): 1.7 times as many tokens a second, and prompts are read
        2.5 times as fast; but not with experts, whose weights XLA would copy for each token."""
        fast = checkpoint.dtype == "bfloat16" and not checkpoint.config.num_experts and has_matrix_unit()
        return "bfloat16" if fast else None

    def matrices_dtype(self, checkpoint: Checkpoint, dtype: str) -> str:
        """In the file's bfloat16 those of a model in float32, where `linear_on_cpu` loses nothing by it and a matrix
        unit makes it the faster one."""
        exact = all(tensor.dtype.name == "bfloat16" for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1)
        kept = dtype == "float32" and exact and not checkpoint.config.num_experts and has_matrix_unit()
        return "bfloat16" if kept else dtype

    def packing(self, config: ModelConfig, packs: Packing) -> Packing:
        """In this form before the layers are stacked: a number of 4 bits would lie there as a byte."""

        def packed(pack: Callable[[Array], Any], weight: Array) -> Any:
            return on_cpu(pack(weight))

        alone = {p.name for p in parameters(config) if not p.of_expert}
        return {name: functools.partial(packed, pack) if name in alone else pack for name, pack in packs.items()}

    def cache_dtype(self, model: Model) -> Any:
        """float32: XLA would copy a whole cache in bfloat16 to write one slot of it."""
        return jnp.float32

    def of(self, model: Model) -> Model:
        return unstack_layers(model, donate=True)


def form_of(decoding: bool, mesh: Mesh | None) -> Form:
    """Of a model to be loaded, for ``decoding`` or for training, over a ``mesh`` or not."""
    return CpuForm() if decoding and mesh is None and platform() == "cpu" else Form()


def form_of_model(model: Model) -> Form:
    """The one that a model has."""
    return CpuForm() if isinstance(model.model.layers, Layers) else Form()


def for_decoding(model: Model) -> Model:
    """The model in the form that decodes fastest here; the one that was given is used up."""
    return form_of(True, model.mesh).of(model)


class Layers(nnx.List):
    """Layers with arrays of their own, which run one after the other."""

    def run_layers(self, x: Float[Array, "B T D"], positions: Positions, cache: Cache | None) -> Ran:
        """As `layers.stack.run_layers`."""
        positions, each = _materialize(positions), []
        for index, layer in enumerate(self):
            x, cache, aux_loss = layer(x, positions, cache, index)
            each.append(aux_loss)
        return x, cache, jnp.mean(jnp.stack(each))


def _materialize(positions: Positions) -> Positions:
    """The same, as products with ones, which are exact and which XLA:CPU makes once. Where the layers are no loop it
    would work out sines and cosines in each layer, for each of its heads."""
    ones = jnp.eye(positions.cos.shape[-1])
    cos, sin = (jnp.matmul(x, ones, precision=jax.lax.Precision.HIGHEST) for x in (positions.cos, positions.sin))
    return dataclasses.replace(positions, cos=cos, sin=sin)


def unstack_layers(model: Model, donate: bool = False) -> Model:
    """The same weights with one array for each layer. Those lie where the stacked ones do; only layers that do not
    begin at a multiple of 64 bytes are copied. ``donate``: the model that was given loses its layers, one stacked
    array after the other. One that is unstacked already is given back."""
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
    return jax.tree.map(_converted, copy, is_leaf=lambda part: isinstance(part, MATRICES))


MATRICES = Linear, Embedding, ExpertLinear


def _converted(part: Any) -> Any:
    """A layer with its weight in the form for a CPU."""
    if isinstance(part, MATRICES):
        weight = part.weight if isinstance(part, ExpertLinear) else on_cpu(part.weight)
        part.weight = weight if isinstance(weight, CpuQuantizedWeight | CpuQuantizedEmbedding) else CpuMatrix(weight)
    return part


def has_matrix_unit() -> bool:
    """Whether this CPU multiplies bfloat16 in a unit for matrices (AMX)."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text().split()
    except OSError:  # no Linux
        return False
