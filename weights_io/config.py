"""The model config: ``config.json`` with the defaults of the original configuration classes.

Released MiniCPM configs have no ``model_type``, ``rope_theta`` or ``tie_word_embeddings``. The original class defaults
them to minicpm, 10000.0 and True. An unknown key that may change the logits is refused by name.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weights_io.config_keys import (
    IGNORED_KEYS,
    LARGEST,
    PER_LAYER,
    SMALLEST,
    UNSUPPORTED_UNLESS,
    among,
    check_sparse,
    other_model,
)
from weights_io.errors import InputError, short, shown
from weights_io.files.json_text import read_json
from weights_io.quantization.entries import KEYS, scheme_of_config
from weights_io.rope_config import LongRoPE, RopeScaling, check_llama, check_scaling, rope_parameters, rope_scaling
from weights_io.vision.config import VisionConfig, read_vision, vision_keys, within_window


@dataclass(frozen=True)
class Family:
    """What a ``model_type`` means. docs/architecture.md tells how to add a family."""

    architecture: str  # the entry of config.json's ``architectures``
    defaults: dict[str, Any]  # defaults of its configuration class that differ from `COMMON_DEFAULTS`
    scaled: bool = False  # muP's scales are applied to the embedding, the residual branches and the logits
    heads_fill_hidden: bool = False  # its attention requires head_dim = hidden_size / num_attention_heads
    ignored: frozenset[str] = frozenset()  # keys that its original code does not use
    table: "Callable[[ModelConfig], Sequence[Any]] | None" = None  # its parameter table; None: the standard decoder's
    renames: tuple[tuple[str, str], ...] = ()  # prefix of tensor names in the files -> prefix in the parameter table


# Defaults: MiniCPM's class (configuration_minicpm.py of April 2024), MiniCPM3's (of September 2024) and Llama's
# (transformers).
_SCALES: dict[str, Any] = {"tie_word_embeddings": True, "scale_emb": 1.0, "dim_model_base": 1, "scale_depth": 1.0}
FAMILIES = {
    "minicpm": Family(
        "MiniCPMForCausalLM",
        _SCALES | {"num_experts": None, "num_experts_per_tok": None},
        scaled=True,
        heads_fill_hidden=True,
        ignored=frozenset({"head_dim"}),
    ),
    "minicpm3": Family(
        "MiniCPM3ForCausalLM",
        _SCALES | {"q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
        scaled=True,
        heads_fill_hidden=True,
        # Each head has its own key and value, and its values have hidden_size / num_attention_heads numbers.
        ignored=frozenset({"num_key_value_heads", "head_dim", "v_head_dim"}),
    ),
    # MiniCPM-S-1B-sft-llama-format still states the scales that are folded into its weights.
    "llama": Family(
        "LlamaForCausalLM",
        {"tie_word_embeddings": False},
        ignored=frozenset({"scale_emb", "scale_depth", "dim_model_base"}),
    ),
    # MiniCPM-V 1.0 and 2.0: MiniCPM's decoder behind a tower and a resampler. OmniLMM-12B's decoder is Mistral's.
    "minicpmv": Family(
        "MiniCPMV",
        _SCALES,
        scaled=True,
        heads_fill_hidden=True,
        ignored=frozenset({"head_dim"}),
        renames=(("llm.", ""),),
    ),
    "omnilmm": Family(
        "OmniLMMForCausalLM",
        {"tie_word_embeddings": False},
        renames=(("model.vision_tower.", "vpm."), ("model.resampler.", "resampler.")),
    ),
}
COMMON_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "hidden_act_param": None,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
ACTIVATIONS = ("silu", "relu", "fatrelu")
DTYPES = ("float32", "bfloat16", "float16")
DTYPE_NAMES = {name: name for name in DTYPES} | {"float": "float32", "half": "float16"}  # torch's short names too
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")  # the sizes of latent attention
MAX_COUNT = 2**31 - 1  # sizes and positions are int32 in both backends
# The table lists every layer and expert. The deepest released MiniCPM has 62 layers, the widest 40 layers of 8 experts.
MAX_LAYERS = 1000
MAX_EXPERTS = 1024  # of a layer
MAX_EXPERT_LAYERS = 100_000  # experts of all layers
MOST = {"num_hidden_layers": MAX_LAYERS, "num_experts": MAX_EXPERTS}


@dataclass(frozen=True)
class ModelConfig:
    """Shape and scales of a decoder, under the names of ``config.json``.

    Every number changes the logits: ``max_position_embeddings`` under dynamic RoPE scaling and LongRoPE,
    ``initializer_range`` in a newly initialized model.
    """

    model_type: str = "minicpm"  # of `FAMILIES`
    vocab_size: int = 32000  # V
    hidden_size: int = 4096  # D
    intermediate_size: int = 11008  # F
    num_hidden_layers: int = 32  # L
    num_attention_heads: int = 32  # N
    num_key_value_heads: int = 32  # K
    head_dim: int = 128  # H; with latent attention the width of a head's values
    q_lora_rank: int = 0  # Q: width of the latent of the queries
    kv_lora_rank: int = 0  # C: width of the latent of keys and values; 0: no latent attention
    qk_nope_head_dim: int = 0  # width of a key's part without RoPE
    qk_rope_head_dim: int = 0  # R: width of the rotated part, which all heads share
    num_experts: int = 0  # E; 0: dense
    num_experts_per_tok: int = 0  # C: experts selected per token
    hidden_act: str = "silu"  # silu | relu | fatrelu
    hidden_act_param: float | None = None  # fatrelu's threshold
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | LongRoPE | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    scale_emb: float = 1.0
    scale_depth: float = 1.0
    dim_model_base: int = 1
    vision: VisionConfig | None = None  # of a model that sees

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def rope_dim(self) -> int:
        """The numbers of a head that RoPE rotates; half as many frequencies."""
        return self.qk_rope_head_dim if self.is_latent else self.head_dim

    @property
    def rope_amplitude(self) -> float:
        """Factor on the cosines and sines of RoPE."""
        scaling = self.rope_scaling
        return scaling.amplitude(self.max_position_embeddings) if isinstance(scaling, LongRoPE) else 1.0

    @property
    def embedding_scale(self) -> float:
        """Factor on the token embedding (not on input embeddings that the caller passes)."""
        return self.scale_emb if self.family.scaled else 1.0

    @property
    def residual_scale(self) -> float:
        """Factor on the output of attention and MLP before it is added to the residual stream."""
        return self.scale_depth / math.sqrt(self.num_hidden_layers) if self.family.scaled else 1.0

    @property
    def logit_divisor(self) -> float:
        """Divisor of the final hidden state before the head, tied or not. It is also muP's width ratio."""
        return self.hidden_size / self.dim_model_base if self.family.scaled else 1.0

    @property
    def is_latent(self) -> bool:
        """Whether attention is multi-head latent attention (arXiv 2405.04434), which caches latents."""
        return self.kv_lora_rank > 0

    @property
    def activation_threshold(self) -> float | None:
        """Threshold of the activation: x where x >= threshold, else 0 (FATReLU, arXiv 2402.13516, eq. 3; 0 is ReLU).
        None means SiLU."""
        return {"silu": None, "relu": 0.0, "fatrelu": self.hidden_act_param}[self.hidden_act]

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """The config of a parsed ``config.json``.

        Arguments:
            raw: the contents.
            source: the name of the file in messages.

        Raises:
            InputError: a value is wrong, or a key may change the logits and is not supported. Names source and key.
        """
        return _Reader(raw, source).config()

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        return cls.from_dict(read_json(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that this class and transformers (for Llama) read back as this config."""
        raw: dict[str, Any] = {"architectures": [self.family.architecture], **dataclasses.asdict(self)}
        absent = ["vision"]
        absent += [] if self.family.scaled else ["scale_emb", "scale_depth", "dim_model_base"]
        absent += list(self.family.ignored) if self.is_latent else list(LATENT)
        absent += [] if self.num_experts else ["num_experts", "num_experts_per_tok"]
        absent += ["hidden_act_param"] if self.hidden_act_param is None else []
        if self.vision is not None:
            raw |= self.vision.to_dict()
        if isinstance(self.rope_scaling, LongRoPE):  # MiniCPM3's code reads type, MiniCPM4's rope_type
            scaling = dataclasses.asdict(self.rope_scaling)
            lists = {key: list(value) for key, value in scaling.items() if isinstance(value, tuple)}
            raw["rope_scaling"] = {"rope_type": self.rope_scaling.type, **scaling, **lists}
        # Other readers of MiniCPM3 require these, or default v_head_dim to qk_nope_head_dim.
        heads = {"num_key_value_heads": self.num_attention_heads, "v_head_dim": self.head_dim}
        return {key: value for key, value in raw.items() if key not in absent} | (heads if self.is_latent else {})


@dataclass
class _Reader:
    raw: dict[str, Any]
    source: str
    seen: set[str] = field(default_factory=set)

    def refuse(self, text: str) -> InputError:
        return InputError(f"{self.source}: {text}")

    def config(self) -> ModelConfig:
        family = self.family()
        stored_dtype(self.raw, self.source)
        defaults = COMMON_DEFAULTS | FAMILIES[family].defaults
        values = {key: self.raw.get(key, default) for key, default in defaults.items()}
        scheme_of_config(self.raw, self.source)
        ignored = FAMILIES[family].ignored
        values |= dict.fromkeys(ignored & values.keys())
        self.refuse_unknown({*defaults, *KEYS, "sparse_config", *ignored, *vision_keys(family)})
        check_sparse(self.raw.get("sparse_config"), self.refuse)
        if "rope_parameters" in self.raw:
            values |= rope_parameters(self.raw, values["rope_theta"], self.refuse)
        for key in ("num_key_value_heads", "head_dim"):
            if values[key] is None:
                n, d = self.count(values, "num_attention_heads"), self.count(values, "hidden_size")
                values[key] = n if key == "num_key_value_heads" else d // n
        values["rope_scaling"] = rope_scaling(values["rope_scaling"], self.refuse)
        for key in {"num_experts", "num_experts_per_tok"} & values.keys():
            values[key] = 0 if among(values[key], (None, 0)) else self.count(values, key)
        for key, value in values.items():
            if key.startswith("num_experts"):
                continue  # may be 0
            if key.startswith("num_") or key.endswith("_size") or key in ("head_dim", "dim_model_base", *LATENT):
                values[key] = self.count(values, key)
            elif key in ("rms_norm_eps", "rope_theta", "scale_emb", "scale_depth", "initializer_range"):
                values[key] = self.number(key, value)
        values["max_position_embeddings"] = self.count(values, "max_position_embeddings")
        if not isinstance(values["tie_word_embeddings"], bool):
            raise self.refuse(f"tie_word_embeddings is {values['tie_word_embeddings']!r}; it must be true or false.")
        values["hidden_act_param"] = self.threshold(values["hidden_act"], values["hidden_act_param"])
        values["max_position_embeddings"] = within_window(
            self.raw, family, values["max_position_embeddings"], self.refuse
        )
        vision = read_vision(self.raw, family, values["hidden_size"], self.refuse)
        config = ModelConfig(model_type=family, vision=vision, **values)
        self.check_experts(config)
        if config.num_attention_heads % config.num_key_value_heads:
            raise self.refuse(
                f"num_attention_heads {config.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{config.num_key_value_heads}; one of the two is wrong."
            )
        if config.rope_dim % 2:
            key = "qk_rope_head_dim" if config.is_latent else "head_dim"
            raise self.refuse(f"{key} {config.rope_dim} is odd, and RoPE rotates pairs; correct it.")
        if config.rope_scaling is not None:
            check_scaling(config.rope_scaling, config.rope_dim, config.max_position_embeddings, self.refuse)
        if isinstance(config.rope_scaling, LongRoPE) and not config.family.scaled:
            check_llama(self.raw, config.rope_scaling, config.max_position_embeddings, self.refuse)
        if config.family.heads_fill_hidden and config.head_dim * config.num_attention_heads != config.hidden_size:
            raise self.refuse(
                f"hidden_size {config.hidden_size} is not num_attention_heads {config.num_attention_heads} x head_dim "
                f"{config.head_dim}, as in MiniCPM; one of them is wrong."
            )
        return config

    def family(self) -> str:
        architectures = self.raw.get("architectures")
        architectures = [] if architectures is None else architectures
        if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
            raise self.refuse(f"architectures is {shown(architectures)}; it must be a list of names.")
        if (reason := other_model(self.raw, architectures)) is not None:
            raise self.refuse(reason)
        known = {family.architecture: name for name, family in FAMILIES.items()}
        if not isinstance(self.raw.get("model_type"), str | None):
            raise self.refuse(f"model_type is {shown(self.raw['model_type'])}; it must be a name.")
        model_type = self.raw.get("model_type")
        if model_type is None:
            model_type = known.get(architectures[0]) if architectures else "minicpm"
        unknown = [a for a in architectures if a not in known]
        if unknown or model_type not in FAMILIES:
            name = short(unknown[0]) if unknown else f"model_type {shown(model_type)}"
            raise self.refuse(f"{name} is not supported; supported are {', '.join(known)}.")
        if architectures and known[architectures[0]] != model_type:
            raise self.refuse(
                f"model_type {model_type!r} contradicts architectures {shown(architectures)}; correct one."
            )
        return model_type

    def refuse_unknown(self, understood: set[str]) -> None:
        for key, value in self.raw.items():
            if key in understood | IGNORED_KEYS:
                continue
            elif key in UNSUPPORTED_UNLESS:
                items = value if key in PER_LAYER and isinstance(value, list) else [value]
                if not all(among(item, UNSUPPORTED_UNLESS[key]) for item in items):
                    raise self.refuse(
                        f"{key} = {shown(value)} changes the logits and is not supported; use a model without it."
                    )
            elif value is not None:
                raise self.refuse(
                    f"{short(key)} = {shown(value)} is unknown and may change the logits; "
                    "remove the key if it is only a note."
                )

    def threshold(self, activation: Any, value: Any) -> float | None:
        if activation not in ACTIVATIONS:
            raise self.refuse(
                f"hidden_act {shown(activation)} is not supported; MiniCPM's are {', '.join(ACTIVATIONS)}."
            )
        if activation != "fatrelu":
            if value is not None:
                raise self.refuse(
                    f"hidden_act_param is {shown(value)}, and {activation} has no parameter; remove the key."
                )
            return None
        if value is None:
            raise self.refuse(
                'hidden_act is "fatrelu" and hidden_act_param, its threshold, is missing; add the value of the model '
                'card, or "hidden_act_param": 0.01 (arXiv 2402.13516, for models of 7B and 13B).'
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LARGEST:
            raise self.refuse(
                f"hidden_act_param is {shown(value)}; the threshold of fatrelu must be a number of at least 0."
            )
        return float(value)

    def check_experts(self, config: ModelConfig) -> None:
        experts, chosen = config.num_experts, config.num_experts_per_tok
        if experts and not chosen:
            raise self.refuse(
                f"num_experts is {experts} and num_experts_per_tok is 0 or missing; add the number of experts per "
                "token (2 in MiniCPM-MoE-8x2B)."
            )
        if chosen and not experts:
            raise self.refuse(
                f"num_experts_per_tok is {chosen} and num_experts is 0 or missing; add the number of experts "
                "(8 in MiniCPM-MoE-8x2B), or remove both keys if the model is dense."
            )
        if experts * config.num_hidden_layers > MAX_EXPERT_LAYERS:
            raise self.refuse(
                f"num_experts {experts} x {config.num_hidden_layers} layers is above the limit of {MAX_EXPERT_LAYERS} "
                "experts; correct one of the two."
            )
        if chosen > experts:
            raise self.refuse(f"num_experts_per_tok {chosen} is above num_experts {experts}; correct one of the two.")

    def count(self, values: dict[str, Any], key: str) -> int:
        value = values[key]
        most = MOST.get(key, MAX_COUNT)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.refuse(f"{key} is {shown(value)}; it must be a positive whole number, at most {most}.")
        return value

    def number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not SMALLEST <= value <= LARGEST:
            raise self.refuse(f"{key} is {shown(value)}; it must be a positive number in float32's range.")
        return float(value)


def stored_dtype(raw: dict[str, Any], source: str = "config.json") -> str | None:
    """The dtype in ``config.json`` (``torch_dtype``, or ``dtype`` in transformers 5); None if it states none."""
    found = None
    for key in ("torch_dtype", "dtype"):
        value = raw.get(key)
        if value is None or value == "auto":
            continue
        found = DTYPE_NAMES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
        if found is None:
            raise InputError(
                f"{source}: {key} is {shown(value)}; it must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, or be "
                "removed."
            )
    return found
