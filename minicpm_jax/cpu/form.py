"""The form of a model in which a CPU decodes fastest: one array for each layer."""

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from minicpm_jax import device
from minicpm_jax.cpu.packed import on_cpu
from minicpm_jax.cpu.products import product_on_cpu, rows_on_cpu
from minicpm_jax.layers.linear import Embedding, Linear
from minicpm_jax.layers.moe import ExpertLinear
from minicpm_jax.model import Model
from weights_io.checkpoint import Checkpoint


def unstack(model: Model, give_up: bool = False) -> Model:
    """The same weights with one array for each layer: the faster form for decoding on a CPU, which reads such three
    times as fast. There they lie where the stacked ones do; only layers that do not begin at a multiple of 64 bytes are
    copied. ``give_up``: the model that was given loses its layers, one stacked array after the other. One that is
    unstacked already is given back."""
    if isinstance(model.model.layers, nnx.List):
        return model
    leaves, form = jax.tree.flatten(model.model.layers)
    depth = model.config.num_hidden_layers
    each: list[list[Array]] = [[] for _ in range(depth)]
    for leaf in leaves:
        stacked, place = np.asarray(leaf), next(iter(leaf.devices()))
        for layer, own in zip(each, stacked, strict=True):
            layer.append(jax.device_put(own, place))
        if give_up:
            leaf.delete()
    copy = jax.tree.map(lambda x: x, model)
    copy.model.layers = nnx.List([jax.tree.unflatten(form, layer) for layer in each])
    for _, node in list(nnx.iter_graph(copy)):
        if isinstance(node, Linear | Embedding | ExpertLinear):
            node.product = product_on_cpu
        if isinstance(node, Linear | Embedding):
            node.weight = on_cpu(node.weight)
        if isinstance(node, Embedding):
            node.rows = rows_on_cpu
    return copy


def for_decoding(model: "Model") -> "Model":
    """The model in the form that decodes fastest here; the one that was given is used up."""
    return unstack(model, give_up=True) if model.model.mesh is None and jax.default_backend() == "cpu" else model


def matrices_dtype(checkpoint: Checkpoint, dtype: str) -> str:
    """In what a model for decoding in ``dtype`` keeps its matrices on a CPU: in the file's bfloat16 those of a model in
    float32, where `product_on_cpu` loses nothing by it and a matrix unit makes it the faster one."""
    exact = all(tensor.dtype.name == "bfloat16" for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1)
    kept = dtype == "float32" and exact and not checkpoint.config.num_experts and device.has_matrix_unit()
    return "bfloat16" if kept else dtype
