"""The one parameter table: the name, shape, logical axes and initializer of every weight of a model.

Loader, exporter, abstract shapes, shardings, initialization and both backends read this table; there is no second list.
A parameter has a name in three layouts:

- Hugging Face files (``hf_name``): one tensor per layer and expert.
- The MLX model (`Parameter.mlx_names`): one array per layer, with the layer's experts stacked.
- The JAX model (`Parameter.name`): one array, with layers and experts stacked.

The index of a stacked axis is left out of the name. Matrices keep the [out, in] order of the files.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from weights_io.config import ModelConfig
from weights_io.errors import InputError, listed

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Parameter:
    """One row of the table: a weight that the model has once, once per layer, or once per layer and expert."""

    hf_name: str  # "model.layers.{layer}.mlp.experts.{expert}.w1.weight"
    dims: str  # one letter per dimension of the tensor in the files: "F D"
    axes: tuple[str, ...]  # the logical axis of each dimension, for the sharding rules
    init: str  # embedding | matrix | ones

    @property
    def name(self) -> str:
        """Path in the JAX model: ``model.layers.mlp.experts.w1.weight``."""
        return self.hf_name.replace(".{layer}", "").replace(".{expert}", "")

    @property
    def per_layer(self) -> bool:
        """Whether each layer has its own."""
        return "{layer}" in self.hf_name

    @property
    def per_expert(self) -> bool:
        """Whether each expert of a layer has its own."""
        return "{expert}" in self.hf_name

    @property
    def adds_to_residual(self) -> bool:
        """Whether its output is added to the residual stream: o_proj, and down_proj or the experts' w2."""
        return self.per_layer and self.init == "matrix" and self.axes[0] == "embed"

    def mlx_names(self, config: ModelConfig) -> dict[str, list[str]]:
        """Name in the MLX model, one per layer -> the Hugging Face names of the tensors stacked under it."""
        layers = range(config.num_hidden_layers if self.per_layer else 1)
        experts = range(config.num_experts if self.per_expert else 1)
        return {
            self.hf_name.replace(".{expert}", "").format(layer=i): [
                self.hf_name.format(layer=i, expert=e) for e in experts
            ]
            for i in layers
        }

    def hf_names(self, config: ModelConfig) -> list[str]:
        """The names of its tensors in Hugging Face files, in stacking order."""
        return [hf_name for experts in self.mlx_names(config).values() for hf_name in experts]

    def stack(self, config: ModelConfig) -> tuple[int, ...]:
        """Sizes of the stacked axes, at most (L, E). ``np.ndindex(*stack)`` runs in the order of `hf_names`."""
        return (config.num_hidden_layers,) * self.per_layer + (config.num_experts,) * self.per_expert

    def tensor_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of one tensor in the files, without stacked axes."""
        return tuple(dimensions(config)[d] for d in self.dims.split())

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape in the JAX model: ``stack`` followed by `tensor_shape`."""
        return self.stack(config) + self.tensor_shape(config)

    def layer_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape in the MLX model: stacked over experts only."""
        return self.shape(config)[self.per_layer :]

    @property
    def is_decayed(self) -> bool:
        """Whether fine-tuning applies weight decay to it. Norm weights, which start as ones, are not decayed."""
        return self.init != "ones"

    def logical_axes(self) -> tuple[str, ...]:
        """The logical axis of each dimension of `shape`."""
        return ("layers",) * self.per_layer + ("expert",) * self.per_expert + self.axes

    def init_std(self, config: ModelConfig) -> float:
        """Standard deviation of the initial values. muP divides a matrix's by sqrt(D / dim_model_base)
        (arXiv 2404.06395)."""
        width = config.logit_divisor if self.init == "matrix" else 1.0
        return config.initializer_range / math.sqrt(width)

    def learning_rate_scale(self, config: ModelConfig) -> float:
        """muP's factor on the global learning rate: dim_model_base / D for matrices, 1 for the rest."""
        return 1 / config.logit_divisor if self.init == "matrix" else 1.0


# V vocabulary, D hidden, F intermediate, N query heads, K key/value heads, H head dimension, E experts. For latent
# attention: Q latent of the queries, C latent of keys and values, R rotary key, P key without RoPE and rotary key, U
# key without RoPE and value.
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
# MiniCPM3's. Every device of tensor computes the latents ("latent"), and its own heads from them.
LATENT_ATTENTION = (
    ATTENTION[0],
    Parameter(_LAYER + "self_attn.q_a_proj.weight", "Q D", ("latent", "embed"), "matrix"),
    Parameter(_LAYER + "self_attn.q_a_layernorm.weight", "Q", ("norm",), "ones"),
    Parameter(_LAYER + "self_attn.q_b_proj.weight", "NP Q", ("heads", "from_latent"), "matrix"),
    Parameter(_LAYER + "self_attn.kv_a_proj_with_mqa.weight", "CR D", ("latent", "embed"), "matrix"),
    Parameter(_LAYER + "self_attn.kv_a_layernorm.weight", "C", ("norm",), "ones"),
    Parameter(_LAYER + "self_attn.kv_b_proj.weight", "NU C", ("heads", "from_latent"), "matrix"),
    *ATTENTION[4:],
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


def head_parameter(config: ModelConfig) -> Parameter:
    """The parameter that computes the logits: the embedding if it is tied."""
    return EMBEDDING if config.tie_word_embeddings else HEAD


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """The table of a config's architecture. A tied head has no row of its own."""
    if config.family.table is not None:
        return tuple(config.family.table(config))
    attention = LATENT_ATTENTION if config.is_latent else ATTENTION
    table = (EMBEDDING, *attention, *(MOE if config.num_experts else MLP), NORM)
    return table if config.tie_word_embeddings else (*table, HEAD)


def dimensions(config: ModelConfig) -> dict[str, int]:
    """The size of each letter of `Parameter.dims`."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "NH": config.num_attention_heads * config.head_dim,
        "KH": config.num_key_value_heads * config.head_dim,
        "E": config.num_experts,
        "Q": config.q_lora_rank,
        "C": config.kv_lora_rank,
        "CR": config.kv_lora_rank + config.qk_rope_head_dim,
        "NP": config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim),
        "NU": config.num_attention_heads * (config.qk_nope_head_dim + config.head_dim),
    }


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every Hugging Face tensor name with its shape, in table order."""
    for parameter in parameters(config):
        for hf_name in parameter.hf_names(config):
            yield hf_name, parameter.tensor_shape(config)


def count(config: ModelConfig) -> int:
    """Number of parameters; 2,724,880,896 for MiniCPM-2B, 13,873,291,776 for MiniCPM-MoE-8x2B."""
    return sum(math.prod(parameter.shape(config)) for parameter in parameters(config))


def count_active(config: ModelConfig) -> int:
    """Number of parameters that one token is computed with: 4,318,142,976 in MiniCPM-MoE-8x2B."""
    idle = config.num_experts - config.num_experts_per_tok
    experts = [parameter for parameter in parameters(config) if parameter.per_expert]
    return count(config) - idle * sum(math.prod(p.shape(config)) // config.num_experts for p in experts)


def module_name(tensor: str) -> str:
    """The module that a weight belongs to: its name without ``.weight`` (``model.layers.0.self_attn.q_proj``)."""
    return tensor.removesuffix(".weight")


def target_parameters(config: ModelConfig, targets: Sequence[str] | None) -> tuple[Parameter, ...]:
    """The matrices that an adapter's ``targets`` select.

    Arguments:
        config: the model's.
        targets: each is the end of a module name (``q_proj``, ``self_attn.q_proj``, ``w1``) or ``all-linear``, which
            selects every matrix of the layers except an MoE router. The router is selected only by its name, ``gate``.
            None selects those of OpenBMB's training script, `default_targets`.

    Returns:
        The rows of the table, in table order.

    Raises:
        InputError: a target matches no matrix, or there is no target.
    """
    matrices = [p for p in parameters(config) if p.per_layer and p.init == "matrix"]
    found: set[str] = set()
    for target in default_targets(config) if targets is None else targets:
        hits = {p.name for p in matrices if target == ALL_LINEAR and not is_router(p)}
        hits |= {p.name for p in matrices if f".{module_name(p.name)}".endswith(f".{target}") and target}
        if not hits:
            raise InputError(
                f"the model has no matrix {target!r} that an adapter can change; choose among "
                f"{listed(short_name(p) for p in matrices)}, or give {ALL_LINEAR}."
            )
        found |= hits
    if not found:
        raise InputError(f"an adapter needs at least one target; {ALL_LINEAR} selects every matrix of the layers.")
    return tuple(p for p in matrices if p.name in found)


def default_targets(config: ModelConfig) -> tuple[str, ...]:
    """The matrices that OpenBMB's training script adapts."""
    latent = "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"
    return latent if config.is_latent else ("q_proj", "v_proj")


def is_router(parameter: Parameter) -> bool:
    return "router" in parameter.axes


def layer_of(name: str) -> int:
    """The layer index in a name: 3 for ``model.layers.3.mlp.experts.5.w1``."""
    return int(name.removeprefix(LAYERS).partition(".")[0])


def short_name(parameter: Parameter) -> str:
    """The last part of a module's name, as adapter targets are written: ``q_proj``."""
    return module_name(parameter.name).rpartition(".")[2]


def modules(config: ModelConfig) -> dict[str, Parameter]:
    """Module name -> row of the table, for every module that an adapter may change, the router included."""
    matrices = [p for p in parameters(config) if p.per_layer and p.init == "matrix"]
    return {module_name(hf_name): p for p in matrices for hf_name in p.hf_names(config)}
