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
from weights_io.vision.config import VisionConfig

ALL_LINEAR = "all-linear"
VISION = ("vpm.", "resampler.")  # before the names of a tower's and a resampler's weights
CONSTANTS = {"ones": 1.0, "zeros": 0.0}  # initial values that are no random numbers


@dataclass(frozen=True)
class Parameter:
    """One row of the table: a weight that the model has once, once per layer, or once per layer and expert."""

    hf_name: str  # "model.layers.{layer}.mlp.experts.{expert}.w1.weight"
    dims: str  # one letter per dimension of the tensor in the files: "F D"
    axes: tuple[str, ...]  # the logical axis of each dimension, for the sharding rules
    init: str  # embedding | matrix | ones | zeros

    @property
    def name(self) -> str:
        """Path in the JAX model: ``model.layers.mlp.experts.w1.weight``."""
        return self.hf_name.replace(".{layer}", "").replace(".{expert}", "")

    @property
    def of_vision(self) -> bool:
        """Whether it belongs to the tower or the resampler of a model that sees."""
        return self.hf_name.startswith(VISION)

    @property
    def per_layer(self) -> bool:
        """Whether each layer, or each block of a tower, has its own."""
        return "{layer}" in self.hf_name

    @property
    def per_expert(self) -> bool:
        """Whether each expert of a layer has its own."""
        return "{expert}" in self.hf_name

    @property
    def adds_to_residual(self) -> bool:
        """Whether its output is added to the residual stream: o_proj, and down_proj or the experts' w2."""
        return self.per_layer and not self.of_vision and self.init == "matrix" and self.axes[0] == "embed"

    def mlx_names(self, config: ModelConfig) -> dict[str, list[str]]:
        """Name in the MLX model, one per layer -> the Hugging Face names of the tensors stacked under it."""
        layers = range(self.depth(config) if self.per_layer else 1)
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

    def depth(self, config: ModelConfig) -> int:
        """Layers of the part that it belongs to: the decoder, or a tower."""
        vision = config.vision if self.of_vision else None
        return config.num_hidden_layers if vision is None else vision.num_hidden_layers

    def stack(self, config: ModelConfig) -> tuple[int, ...]:
        """Sizes of the stacked axes, at most (L, E). ``np.ndindex(*stack)`` runs in the order of `hf_names`."""
        return (self.depth(config),) * self.per_layer + (config.num_experts,) * self.per_expert

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
        """Whether fine-tuning applies weight decay to it. Norm weights, which start as ones, and biases are not."""
        return self.init not in CONSTANTS

    def logical_axes(self) -> tuple[str, ...]:
        """The logical axis of each dimension of `shape`."""
        return ("layers",) * self.per_layer + ("expert",) * self.per_expert + self.axes

    def init_std(self, config: ModelConfig) -> float:
        """Standard deviation of the initial values. muP divides a matrix's by sqrt(D / dim_model_base)
        (arXiv 2404.06395)."""
        width = config.logit_divisor if self.init == "matrix" and not self.of_vision else 1.0
        return config.initializer_range / math.sqrt(width)

    def learning_rate_scale(self, config: ModelConfig) -> float:
        """muP's factor on the global learning rate: dim_model_base / D for matrices, 1 for the rest."""
        return 1 / config.logit_divisor if self.init == "matrix" and not self.of_vision else 1.0


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


def _linear(name: str, out: str, width: str) -> tuple[Parameter, Parameter]:
    """A weight [out, width] of a tower or a resampler, and its bias."""
    axes = ("vision_out", "vision_in")
    return Parameter(f"{name}.weight", f"{out} {width}", axes, "matrix"), _bias(f"{name}.bias", out)


def _bias(name: str, width: str) -> Parameter:
    return Parameter(name, width, ("norm",), "zeros")


def _layer_norm(name: str, width: str) -> tuple[Parameter, Parameter]:
    return Parameter(f"{name}.weight", width, ("norm",), "ones"), _bias(f"{name}.bias", width)


# The tower of MiniCPM-V, which `vision_parameters` changes to OmniLMM's: W width, M intermediate, O stored positions.
# The resampler: S queries.
_BLOCK = "vpm.blocks.{layer}."
_QKV = _linear(_BLOCK + "attn.qkv", "3W", "W")
TOWER = (
    Parameter("vpm.pos_embed", "1 O W", ("norm", "norm", "norm"), "embedding"),
    Parameter("vpm.patch_embed.proj.weight", "W RGB PX PX", ("norm",) * 4, "matrix"),
    _bias("vpm.patch_embed.proj.bias", "W"),
    *_layer_norm(_BLOCK + "norm1", "W"),
    *_QKV,
    *_linear(_BLOCK + "attn.proj", "W", "W"),
    *_layer_norm(_BLOCK + "norm2", "W"),
    *_linear(_BLOCK + "mlp.fc1", "M", "W"),
    *_linear(_BLOCK + "mlp.fc2", "W", "M"),
    *_layer_norm("vpm.norm", "W"),
)
EVA = (
    Parameter("vpm.cls_token", "1 1 W", ("norm",) * 3, "embedding"),
    _bias(_BLOCK + "attn.q_bias", "W"),
    _bias(_BLOCK + "attn.v_bias", "W"),
)
RESAMPLER = (
    Parameter("resampler.query", "S D", ("norm", "norm"), "embedding"),
    Parameter("resampler.pos_embed", "S D", ("norm", "norm"), "embedding"),
    Parameter("resampler.proj", "D D", ("vision_in", "vision_out"), "matrix"),
    Parameter("resampler.kv_proj.weight", "D W", ("vision_out", "vision_in"), "matrix"),
    Parameter("resampler.attn.in_proj_weight", "3D D", ("vision_out", "vision_in"), "matrix"),
    _bias("resampler.attn.in_proj_bias", "3D"),
    *_linear("resampler.attn.out_proj", "D", "D"),
    *_layer_norm("resampler.ln_q", "D"),
    *_layer_norm("resampler.ln_kv", "D"),
    *_layer_norm("resampler.ln_post", "D"),
)


def head_parameter(config: ModelConfig) -> Parameter:
    """The parameter that computes the logits: the embedding if it is tied."""
    return EMBEDDING if config.tie_word_embeddings else HEAD


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """The table of a config's architecture. A tied head has no row of its own."""
    if config.family.table is not None:
        return tuple(config.family.table(config))
    attention = LATENT_ATTENTION if config.is_latent else ATTENTION
    table = (EMBEDDING, *attention, *(MOE if config.num_experts else MLP), NORM)
    return (*table, *(() if config.tie_word_embeddings else (HEAD,)), *vision_parameters(config.vision))


def vision_parameters(vision: VisionConfig | None) -> tuple[Parameter, ...]:
    """The rows of a tower and a resampler. EVA's attention has biases of queries and values under their own names;
    kv_proj is absent where the tower is as wide as the decoder."""
    if vision is None:
        return ()
    tower = TOWER if vision.tower == "siglip" else (*(p for p in TOWER if p is not _QKV[1]), *EVA)
    same = vision.hidden_size == vision.text_hidden_size
    return (*tower, *(p for p in RESAMPLER if not (same and p.name == "resampler.kv_proj.weight")))


def dimensions(config: ModelConfig) -> dict[str, int]:
    """The size of each letter of `Parameter.dims`."""
    vision = config.vision
    seen = (
        {}
        if vision is None
        else {
            "1": 1,
            "RGB": 3,
            "PX": vision.patch_size,
            "O": vision.positions,
            "W": vision.hidden_size,
            "3W": 3 * vision.hidden_size,
            "M": vision.intermediate_size,
            "S": vision.num_queries,
            "3D": 3 * config.hidden_size,
        }
    )
    return seen | {
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
    matrices = _adaptable(config)
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


def _adaptable(config: ModelConfig) -> list[Parameter]:
    """The matrices of the decoder's layers."""
    return [p for p in parameters(config) if p.per_layer and p.init == "matrix" and not p.of_vision]


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
    matrices = _adaptable(config)
    return {module_name(hf_name): p for p in matrices for hf_name in p.hf_names(config)}
