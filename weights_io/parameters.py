"""The one parameter table: what a model holds, under which name, in which shape, and how it begins.

Loader, exporter, abstract shapes, shardings, initialisation and both backends read this table; there is no second list.
A parameter's ``name`` is its path in the JAX model, where the layers are stacked on axis 0; its ``tensor`` is the name
in Hugging Face files and in the MLX model, one for each layer. Matrices keep the [out, in] order of the files.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from weights_io.config import ModelConfig


@dataclass(frozen=True)
class Parameter:
    tensor: str  # "model.layers.{layer}.mlp.up_proj.weight"
    dims: str  # one letter a dimension, of one layer: "F D"
    axes: tuple[str, ...]  # logical axes of those dimensions, for sharding rules
    init: str  # embedding | matrix | ones

    @property
    def name(self) -> str:
        """Path in the JAX model: ``model.layers.mlp.up_proj.weight``."""
        return self.tensor.replace(".{layer}", "")

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.tensor

    def tensors(self, config: ModelConfig) -> list[str]:
        """Its Hugging Face names, in stacking order."""
        return [self.tensor.format(layer=i) for i in range(config.num_hidden_layers)] if self.stacked else [self.tensor]

    def tensor_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of one tensor in the files."""
        return tuple(dimensions(config)[d] for d in self.dims.split())

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape in the JAX model: stacked over layers where it belongs to one."""
        return (config.num_hidden_layers,) * self.stacked + self.tensor_shape(config)

    def logical_axes(self) -> tuple[str, ...]:
        """One logical axis for each dimension of `shape`."""
        return ("layers",) * self.stacked + self.axes

    def init_std(self, config: ModelConfig) -> float:
        """Standard deviation at the start; muP divides a matrix's by sqrt(D / dim_model_base) (arXiv 2404.06395)."""
        width = config.logit_divisor if self.init == "matrix" else 1.0
        return config.initializer_range / math.sqrt(width)

    def learning_rate_scale(self, config: ModelConfig) -> float:
        """muP's share of the global learning rate: 1 / (D / dim_model_base) for matrices, 1 for the rest."""
        return 1 / config.logit_divisor if self.init == "matrix" else 1.0


# V vocabulary, D hidden, F intermediate, N query heads, K key/value heads, H head dimension.
_LAYER = "model.layers.{layer}."
DENSE = (
    Parameter("model.embed_tokens.weight", "V D", ("vocab", "embed"), "embedding"),
    Parameter(_LAYER + "input_layernorm.weight", "D", ("embed",), "ones"),
    Parameter(_LAYER + "self_attn.q_proj.weight", "NH D", ("heads", "embed"), "matrix"),
    Parameter(_LAYER + "self_attn.k_proj.weight", "KH D", ("kv_heads", "embed"), "matrix"),
    Parameter(_LAYER + "self_attn.v_proj.weight", "KH D", ("kv_heads", "embed"), "matrix"),
    Parameter(_LAYER + "self_attn.o_proj.weight", "D NH", ("embed", "heads"), "matrix"),
    Parameter(_LAYER + "post_attention_layernorm.weight", "D", ("embed",), "ones"),
    Parameter(_LAYER + "mlp.gate_proj.weight", "F D", ("mlp", "embed"), "matrix"),
    Parameter(_LAYER + "mlp.up_proj.weight", "F D", ("mlp", "embed"), "matrix"),
    Parameter(_LAYER + "mlp.down_proj.weight", "D F", ("embed", "mlp"), "matrix"),
    Parameter("model.norm.weight", "D", ("embed",), "ones"),
)
HEAD = Parameter("lm_head.weight", "V D", ("vocab", "embed"), "embedding")


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """The table of this architecture; a tied head has no parameter of its own."""
    return DENSE if config.tie_word_embeddings else (*DENSE, HEAD)


def dimensions(config: ModelConfig) -> dict[str, int]:
    """Sizes of the letters in `Parameter.dims`."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "NH": config.num_attention_heads * config.head_dim,
        "KH": config.num_key_value_heads * config.head_dim,
    }


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every Hugging Face tensor name with its shape, in file order."""
    for parameter in parameters(config):
        for tensor in parameter.tensors(config):
            yield tensor, parameter.tensor_shape(config)


def count(config: ModelConfig) -> int:
    """Number of parameters; 2,724,880,896 for MiniCPM-2B."""
    return sum(math.prod(parameter.shape(config)) for parameter in parameters(config))
