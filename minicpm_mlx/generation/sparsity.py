"""Activation sparsity: the fraction of the MLP's neurons that ReLU or FATReLU sets to 0.

The output of the gate's activation is counted, before the product with up, as in ProSparse (arXiv 2402.13516).
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from minicpm_data.diagnostics.sparsity import checked_threshold
from minicpm_data.generation.request import prompt_ids
from minicpm_mlx.layers.ops import gated_act
from minicpm_mlx.model import Model

PIECE = 512  # tokens per call


class Counting(nn.Module):
    """The gate's projection, which also counts the zeros after the activation."""

    def __init__(self, gate_proj: nn.Module, threshold: float):
        super().__init__()
        self.gate_proj, self.threshold = gate_proj, threshold
        self.zeros = mx.array(0)

    def __call__(self, x: mx.array) -> mx.array:
        gate = self.gate_proj(x)
        self.zeros = self.zeros + (gated_act(gate, mx.ones_like(gate), self.threshold) == 0).sum()
        return gate


def activation_sparsity(model: Model, ids: Sequence[int]) -> np.ndarray:
    """The activation sparsity of each layer on a text.

    Arguments:
        model: a dense model whose activation is ReLU or FATReLU.
        ids: the token ids of one text.

    Returns: [L], the fraction of each layer's neurons that are 0 after the activation, over all tokens.

    Raises: `InputError` if the activation is never 0 (SiLU), if the model has experts, and for empty or invalid ids.
    """
    threshold = checked_threshold(model.config)
    tokens = mx.array([prompt_ids(None, ids, model.config.vocab_size)])
    length = tokens.shape[1]
    gates = [layer.mlp.gate_proj for layer in model.layers]
    counting = [Counting(gate, threshold) for gate in gates]
    cache = make_prompt_cache(model)
    try:
        _replace_gates(model, counting)
        for start in range(0, length, PIECE):
            model.decode(tokens[:, start : start + PIECE], cache, length)
            mx.eval([gate.zeros for gate in counting], [layer.state for layer in cache])
    finally:
        _replace_gates(model, gates)
    zeros = np.array([gate.zeros.item() for gate in counting])
    return zeros / (length * model.config.intermediate_size)


def _replace_gates(model: Model, gates: Sequence[nn.Module]) -> None:
    for layer, gate in zip(model.layers, gates, strict=True):
        layer.mlp.gate_proj = gate
