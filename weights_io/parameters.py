"""The one parameter table: what a model holds, under which name, in which shape, and how it begins.

Loader, exporter, abstract shapes, shardings, initialisation and both backends read this table; there is no second list.
A parameter's ``tensor`` is its name in Hugging Face files, one for each layer and expert. The MLX model stacks the
experts of a layer; the JAX model, where ``name`` is its path, stacks the layers too. A stacked index leaves the name.
Matrices keep the [out, in] order of the files.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from weights_io.config import ModelConfig
from weights_io.errors import InputError, listed

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Parameter:
    tensor: str  # "model.layers.{layer}.mlp.experts.{expert}.w1.weight"
    dims: str  # one letter a dimension, of one tensor: "F D"
    axes: tuple[str, ...]  # logical axes of those dimensions, for sharding rules
    init: str  # embedding | matrix | ones

    @property
    def name(self) -> str:
        """Path in the JAX model: ``model.layers.mlp.experts.w1.weight``."""
        return self.tensor.replace(".{layer}", "").replace(".{expert}", "")

    @property
    def stacked(self) -> bool:
        """Whether each layer has one (or one for each expert)."""
        return "{layer}" in self.tensor

    @property
    def of_expert(self) -> bool:
        return "{expert}" in self.tensor

    @property
    def adds_to_residual(self) -> bool:
        """Whether its outputs are added to the residual stream: o_proj and down_proj, which write into D."""
        return self.stacked and self.init == "matrix" and self.axes[0] == "embed"

    def layers(self, config: ModelConfig) -> dict[str, list[str]]:
        """Its names in the MLX model, one for each layer -> the Hugging Face names of the experts stacked there."""
        layers = range(config.num_hidden_layers if self.stacked else 1)
        experts = range(config.num_experts if self.of_expert else 1)
        return {
            self.tensor.replace(".{expert}", "").format(layer=i): [
                self.tensor.format(layer=i, expert=e) for e in experts
            ]
            for i in layers
        }

    def tensors(self, config: ModelConfig) -> list[str]:
        """Its Hugging Face names, in stacking order."""
        return [tensor for experts in self.layers(config).values() for tensor in experts]

    def stack(self, config: ModelConfig) -> tuple[int, ...]:
        """Sizes of the stacked axes, [L, E] at most: ``np.ndindex`` of them goes through `tensors` in order."""
        return (config.num_hidden_layers,) * self.stacked + (config.num_experts,) * self.of_expert

    def tensor_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of one tensor in the files."""
        return tuple(dimensions(config)[d] for d in self.dims.split())

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape in the JAX model: stacked over layers and experts where it belongs to one."""
        return self.stack(config) + self.tensor_shape(config)

    def layer_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape in the MLX model: stacked over experts."""
        return self.shape(config)[self.stacked :]

    @property
    def is_decayed(self) -> bool:
        """Whether fine-tuning's weight decay goes on it: not on what begins as ones, as norms do, which are lengths."""
        return self.init != "ones"

    def logical_axes(self) -> tuple[str, ...]:
        """One logical axis for each dimension of `shape`."""
        return ("layers",) * self.stacked + ("expert",) * self.of_expert + self.axes

    def init_std(self, config: ModelConfig) -> float:
        """Standard deviation at the start; muP divides a matrix's by sqrt(D / dim_model_base) (arXiv 2404.06395)."""
        width = config.logit_divisor if self.init == "matrix" else 1.0
        return config.initializer_range / math.sqrt(width)

    def learning_rate_scale(self, config: ModelConfig) -> float:
        """muP's share of the global learning rate: 1 / (D / dim_model_base) for matrices, 1 for the rest."""
        return 1 / config.logit_divisor if self.init == "matrix" else 1.0


# V vocabulary, D hidden, F intermediate, N query heads, K key/value heads, H head dimension, E experts.
LAYERS = "model.layers."  # before a layer's number
_LAYER = LAYERS + "{layer}."
_EXPERT = _LAYER + "mlp.experts.{expert}."
EMBEDDING = Parameter("model.embed_tokens.weight", "V D", ("vocab", "embed"), "embedding")
ATTENTION = (
    Parameter(_LAYER + "input_layernorm.weight", "D", ("norm",), "ones"),
    Parameter(_LAYER + "self_attn.q_proj.weight", "NH D", ("heads", "embed"), "matrix"),
    Parameter(_LAYER + "self_attn.k_proj.weight", "KH D", ("kv_heads", "embed"), "matrix"),
    Parameter(_LAYER + "self_attn.v_proj.weight", "KH D", ("kv_heads", "embed"), "matrix"),
    Parameter(_LAYER + "self_attn.o_proj.weight", "D NH", ("embed", "heads"), "matrix"),
    Parameter(_LAYER + "post_attention_layernorm.weight", "D", ("norm",), "ones"),
)
MLP = (
    Parameter(_LAYER + "mlp.gate_proj.weight", "F D", ("mlp", "embed"), "matrix"),
    Parameter(_LAYER + "mlp.up_proj.weight", "F D", ("mlp", "embed"), "matrix"),
    Parameter(_LAYER + "mlp.down_proj.weight", "D F", ("embed", "mlp"), "matrix"),
)
ROUTER = Parameter(_LAYER + "mlp.gate.weight", "E D", ("router", "embed"), "matrix")
EXPERTS = (
    Parameter(_EXPERT + "w1.weight", "F D", ("mlp", "embed"), "matrix"),  # gate
    Parameter(_EXPERT + "w2.weight", "D F", ("embed", "mlp"), "matrix"),  # down
    Parameter(_EXPERT + "w3.weight", "F D", ("mlp", "embed"), "matrix"),  # up
)
MOE = (ROUTER, *EXPERTS)
NORM = Parameter("model.norm.weight", "D", ("norm",), "ones")
HEAD = Parameter("lm_head.weight", "V D", ("vocab", "embed"), "embedding")
DENSE = (EMBEDDING, *ATTENTION, *MLP, NORM)


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """The table of this architecture; a tied head has no parameter of its own."""
    if config.family.table is not None:
        return tuple(config.family.table(config))
    table = (EMBEDDING, *ATTENTION, *MOE, NORM) if config.num_experts else DENSE
    return table if config.tie_word_embeddings else (*table, HEAD)


def dimensions(config: ModelConfig) -> dict[str, int]:
    """Sizes of the letters in `Parameter.dims`."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "NH": config.num_attention_heads * config.head_dim,
        "KH": config.num_key_value_heads * config.head_dim,
        "E": config.num_experts,
    }


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every Hugging Face tensor name with its shape, in file order."""
    for parameter in parameters(config):
        for tensor in parameter.tensors(config):
            yield tensor, parameter.tensor_shape(config)


def count(config: ModelConfig) -> int:
    """Number of parameters; 2,724,880,896 for MiniCPM-2B, 13,873,291,776 for MiniCPM-MoE-8x2B."""
    return sum(math.prod(parameter.shape(config)) for parameter in parameters(config))


def count_active(config: ModelConfig) -> int:
    """Number of parameters that one token is computed with; 4,318,142,976 of MiniCPM-MoE-8x2B's."""
    idle = config.num_experts - config.num_experts_per_tok
    experts = [parameter for parameter in parameters(config) if parameter.of_expert]
    return count(config) - idle * sum(math.prod(p.shape(config)) // config.num_experts for p in experts)


def module_name(tensor: str) -> str:
    """``model.layers.0.self_attn.q_proj`` of a weight's name."""
    return tensor.removesuffix(".weight")


def target_parameters(config: ModelConfig, targets: Sequence[str]) -> tuple[Parameter, ...]:
    """The matrices that ``targets`` name, in table order.

    A target is the last part of a module's name or more of it (``q_proj``, ``self_attn.q_proj``, ``w1``), or
    "all-linear": every matrix of the layers but an MoE's router, which is adapted only where ``gate`` is named itself.
    Raises `InputError` for a name that matches nothing, and lists what there is.
    """
    matrices = [p for p in parameters(config) if p.stacked and p.init == "matrix"]
    found: set[str] = set()
    for target in targets:
        hits = {p.name for p in matrices if target == ALL_LINEAR and not is_router(p)}
        hits |= {p.name for p in matrices if f".{module_name(p.name)}".endswith(f".{target}") and target}
        if not hits:
            raise InputError(
                f"the model has no matrix {target!r} that an adapter could change; choose among "
                f"{listed(short_name(p) for p in matrices)}, or give {ALL_LINEAR}."
            )
        found |= hits
    if not found:
        raise InputError(f"an adapter needs at least one target; {ALL_LINEAR} takes every matrix of the layers.")
    return tuple(p for p in matrices if p.name in found)


def is_router(parameter: Parameter) -> bool:
    return "router" in parameter.axes


def layer_of(name: str) -> int:
    """3 of ``model.layers.3.mlp.experts.5.w1``, a name within a layer."""
    return int(name.removeprefix(LAYERS).partition(".")[0])


def short_name(parameter: Parameter) -> str:
    """``q_proj``, by which targets are told."""
    return module_name(parameter.name).rpartition(".")[2]


def modules(config: ModelConfig) -> dict[str, Parameter]:
    """Every module that an adapter may change -> its row of the table, in table order (the router too)."""
    matrices = [p for p in parameters(config) if p.stacked and p.init == "matrix"]
    return {module_name(tensor): p for p in matrices for tensor in p.tensors(config)}
