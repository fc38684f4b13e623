"""What calibration needs to know of a layer's inputs, and who runs the layer.

Dims: O outputs, I inputs of a matrix, n tokens, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from weights_io.config import ModelConfig
from weights_io.errors import InputError


@dataclass
class InputStats:
    """Sums over the inputs x of a matrix."""

    gram: np.ndarray  # [I, I] float64: the sum of x xᵀ
    magnitude: np.ndarray  # [I] float64: the sum of |x|
    tokens: int = 0

    @classmethod
    def empty(cls, width: int) -> "InputStats":
        return cls(np.zeros((width, width)), np.zeros(width))

    def add(self, gram: np.ndarray, magnitude: np.ndarray, tokens: int) -> None:
        self.gram += gram
        self.magnitude += magnitude
        self.tokens += tokens

    def error(self, change: np.ndarray) -> float:
        """The mean squared norm of ``change`` x, for a change [O, I] of the matrix."""
        return float(np.einsum("oi,ij,oj->", change, self.gram.astype(np.float32), change, optimize=True)) / self.tokens


class LayerRunner(Protocol):
    """Runs one layer, in a backend."""

    def __call__(
        self, config: ModelConfig, weights: Mapping[str, np.ndarray], x: np.ndarray, recorded: Mapping[str, InputStats]
    ) -> np.ndarray:
        """Run a layer in float32.

        Arguments:
            config: the model's.
            weights: name within the layer (``self_attn.q_proj.weight``) -> array.
            x: hidden states [n, T, D].
            recorded: module within the layer -> where its inputs are counted.

        Returns:
            The hidden states after the layer, [n, T, D].
        """
        ...


@dataclass(frozen=True)
class Group:
    """Matrices of a layer that share their input. ``before``: what a factor on the input can be folded into: a norm, or
    a matrix whose outputs are the inputs here."""

    modules: tuple[str, ...]
    before: str | None


def groups_of(config: ModelConfig) -> tuple[Group, ...]:
    """The matrices of a layer, by input. Raises `InputError` for a mixture of experts, most of which see few tokens."""
    if config.num_experts:
        raise InputError("calibration needs inputs for every matrix, and most experts see few; use weights_io.convert.")
    first, second = "input_layernorm", "post_attention_layernorm"
    mlp = (Group(("mlp.gate_proj", "mlp.up_proj"), second), Group(("mlp.down_proj",), "mlp.up_proj"))
    if config.is_latent:
        latent = (
            Group(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), first),
            Group(("self_attn.q_b_proj",), "self_attn.q_a_layernorm"),
            Group(("self_attn.kv_b_proj",), "self_attn.kv_a_layernorm"),
            Group(("self_attn.o_proj",), None),
        )
        return latent + mlp
    shared = config.num_attention_heads != config.num_key_value_heads  # a value's output is an input of several heads
    attention = (
        Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), first),
        Group(("self_attn.o_proj",), None if shared else "self_attn.v_proj"),
    )
    return attention + mlp
