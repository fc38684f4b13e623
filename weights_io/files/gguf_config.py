"""Translate the metadata of a GGUF file (architectures minicpm, minicpm3 and llama) to a ``config.json``.

The meaning of the keys follows llama.cpp's conversion and model code. As with config.json, each key of the
architecture is used, ignored or refused by name. Other keys (``general.``, ``tokenizer.``, a converter's own) are not
model settings.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weights_io.config_keys import among
from weights_io.errors import InputError, listed, short
from weights_io.files.tensor import LazyTensor
from weights_io.rope_config import longrope_amplitude

ARCHITECTURES = {"minicpm": "MiniCPMForCausalLM", "minicpm3": "MiniCPM3ForCausalLM", "llama": "LlamaForCausalLM"}
SCALED = ("minicpm", "minicpm3")
# llama.cpp's tables of RoPE factors, one per frequency: that of Llama 3.1, which is not supported, and LongRoPE's two.
ROPE_FREQS = "rope_freqs.weight"
LONGROPE = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
SCALES = ("embedding_scale", "residual_scale", "logit_scale")
# The keys that are used, without the prefix "ARCHITECTURE.".
USED = frozenset(
    """block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.layer_norm_rms_epsilon attention.key_length attention.value_length rope.dimension_count rope.freq_base
    rope.scaling.type rope.scaling.factor rope.scale_linear rope.scaling.original_context_length
    rope.scaling.attn_factor""".split()
)
LATENT = {"q_lora_rank": "attention.q_lora_rank", "kv_lora_rank": "attention.kv_lora_rank"}  # of minicpm3
# Key -> the supported values, which are also the defaults. Any other value would change the logits.
UNSUPPORTED_UNLESS: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "use_parallel_residual": (False,),
    "swin_norm": (False,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
}
# Keys that llama.cpp does not use, or uses only for other architectures or other RoPE scalings.
IGNORED_KEYS = frozenset(
    """vocab_size tensor_data_layout pooling_type decoder_start_token_id attention.layer_norm_epsilon
    rope.scaling.finetuned""".split()
)


def config_of(path: Path, metadata: Mapping[str, Any], stored: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """The contents of a config.json. ``stored``: the tensors under their GGUF names. Raises `InputError`."""
    return _Metadata(path, metadata).config(stored)


class _Metadata:
    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self.values = path, values
        self.architecture: Any = values.get("general.architecture")

    def config(self, stored: Mapping[str, LazyTensor]) -> dict[str, Any]:
        self.refuse_unsupported(stored)
        embedding = stored.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise InputError(f"{self.path} has no token_embd.weight of two dimensions; convert the model anew.")
        heads = self.count("attention.head_count")
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": embedding.shape[0],
            "hidden_size": self.count("embedding_length"),
            "intermediate_size": self.count("feed_forward_length"),
            "num_hidden_layers": self.count("block_count"),
            "num_attention_heads": heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.count("context_length"),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.number("rope.freq_base", 10000.0),
            "rope_scaling": self.rope_scaling(stored),
            "tie_word_embeddings": "output.weight" not in stored,
        }
        config |= self.latent(config) if self.architecture == "minicpm3" else self.heads(heads)
        if self.architecture in SCALED:
            config |= self.scales(config["hidden_size"], config["num_hidden_layers"])
        for key in ("bos_token_id", "eos_token_id"):
            if (token := self.values.get(f"tokenizer.ggml.{key}")) is not None:
                config[key] = token
        return config

    def refuse_unsupported(self, stored: Mapping[str, LazyTensor]) -> None:
        if not isinstance(self.architecture, str) or self.architecture not in ARCHITECTURES:
            raise InputError(
                f"{self.path} has the architecture {short(repr(self.architecture))}; read here are "
                f"{listed(list(ARCHITECTURES), last=' and ')}."
            )
        if self.values.get("split.count", 0) not in (0, 1):
            raise InputError(f"{self.path} is one part of a split file; join the parts with llama-gguf-split --merge.")
        if self.values.get("general.type", "model") != "model":
            raise InputError(
                f"{self.path} is of general.type {short(self.values['general.type'])}, not a model; take the model."
            )
        self.refuse_unknown()
        if ROPE_FREQS in stored:
            raise InputError(f"{self.path} has {ROPE_FREQS}, a RoPE scaling that is not supported; use another model.")

    def refuse_unknown(self) -> None:
        start = f"{self.architecture}."
        used = USED | set(SCALES if self.architecture in SCALED else ())
        used |= set(LATENT.values() if self.architecture == "minicpm3" else ())
        for name, value in self.values.items():
            key = name.removeprefix(start)
            if not name.startswith(start):
                if not name.startswith(("general.", "tokenizer.")) and name.endswith(tuple(used)):
                    raise InputError(
                        f"{self.path} has {short(name)}, which reads like a key of {self.architecture} and is none; "
                        "convert the model anew."
                    )
            elif key in UNSUPPORTED_UNLESS and not among(value, UNSUPPORTED_UNLESS[key]):
                raise InputError(f"{self.path} has {self._said(key, value)}, which is not supported in GGUF.")
            elif key not in used | UNSUPPORTED_UNLESS.keys() | IGNORED_KEYS:
                raise InputError(
                    f"{self.path} has {self._said(key, value)}, which is not understood and may change the numbers; "
                    "convert the model anew."
                )

    def scales(self, hidden_size: int, layers: int) -> dict[str, Any]:
        """The file has residual_scale = scale_depth / sqrt(layers) and logit_scale = hidden_size / dim_model_base, the
        divisor of the logits. Files of before these keys are MiniCPM-2B, and MiniCPM3-4B's have none. For both, the
        constants are in llama.cpp's code."""
        missing = [f"{self.architecture}.{key}" for key in SCALES if self.get(key) is None]
        if len(missing) == len(SCALES):
            return {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256}
        if missing:
            raise InputError(f"{self.path} lacks {listed(missing)} and has others of the scales; convert it anew.")
        depth = self.number("residual_scale") * math.sqrt(layers)
        base = hidden_size / self.number("logit_scale")
        if abs(base - round(base)) > 1e-5 * base:
            raise InputError(
                f"{self.path} has a {self.architecture}.logit_scale that is not hidden_size / a whole number."
            )
        return {
            "scale_emb": self.number("embedding_scale"),
            "scale_depth": float(f"{depth:.7g}"),  # the digits that a float32 has
            "dim_model_base": round(base),
        }

    def rope_scaling(self, stored: Mapping[str, LazyTensor]) -> dict[str, Any] | None:
        kind = self.get("rope.scaling.type", "linear")
        # llama.cpp reads MiniCPM3's tables whatever the type says, and its converter writes no type there.
        if self.architecture == "minicpm3" and kind in ("linear", "none") and stored.keys() & set(LONGROPE.values()):
            kind = "longrope"
        key = "rope.scaling.factor" if self.get("rope.scaling.factor") is not None else "rope.scale_linear"  # old name
        factor = self.number(key, 1.0)
        if kind == "longrope":
            return self.longrope(stored, factor)
        self.check_amplitude(1, 1)
        if unused := [name for name in LONGROPE.values() if name in stored]:
            raise InputError(
                f"{self.path} has {listed(unused)}, which is used with rope.scaling.type longrope; convert it anew."
            )
        if kind == "none":
            return None
        if kind != "linear":
            raise InputError(
                f"{self.path} has the RoPE scaling {short(repr(kind))}, which is not read from GGUF; linear and "
                "longrope are."
            )
        return None if factor == 1 else {"type": "linear", "factor": factor}

    def longrope(self, stored: Mapping[str, LazyTensor], factor: float) -> dict[str, Any]:
        """The tables of factors are tensors. Without an original length, llama.cpp takes the context's."""
        names = LONGROPE.values()
        most = self.count("embedding_length")  # far above half of a head
        fits = {
            name: name in stored and len(stored[name].shape) == 1 and stored[name].shape[0] <= most for name in names
        }
        if missing := [name for name in names if not fits[name]]:
            raise InputError(f"{self.path} has no {listed(missing)} for its longrope; convert it anew.")
        if factor != 1:
            raise InputError(f"{self.path} has longrope and rope.scaling.factor {factor:g}, which exclude each other.")
        tables = {
            key: [float(str(x)) for x in stored[name].read().astype(np.float32)] for key, name in LONGROPE.items()
        }
        context = self.count("context_length")
        original = self.count("rope.scaling.original_context_length", context)
        self.check_amplitude(context, original)
        return {"rope_type": "longrope", **tables, "original_max_position_embeddings": original}

    def check_amplitude(self, context: int, original: int) -> None:
        """A stated factor on cosines and sines must be the one that the model computes. Raises `InputError`."""
        key = "rope.scaling.attn_factor"
        amplitude = 1.0 if context == original else longrope_amplitude(context, max(2, original))
        if self.get(key) is not None and abs(self.number(key) - amplitude) > 1e-5 * amplitude:
            raise InputError(
                f"{self.path} has {self._said(key, self.number(key))}, where the model's code computes {amplitude:.6g} "
                "from its lengths of context; convert the model anew."
            )

    def latent(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes of MiniCPM3's attention. The width of a value is hidden_size / heads, as in the original."""
        sizes = {key: self.count(name) for key, name in LATENT.items()}
        key_length, rope = self.count("attention.key_length"), self.count("rope.dimension_count")
        if rope >= key_length:
            raise InputError(
                f"{self.path} has {self._said('rope.dimension_count', rope)} and a key_length of {key_length}, which "
                "leaves no part of a key without RoPE; convert the model anew."
            )
        value = config["hidden_size"] // config["num_attention_heads"]
        if self.count("attention.value_length", value) != value:
            raise InputError(
                f"{self.path} has {self._said('attention.value_length', self.get('attention.value_length'))} where "
                f"embedding_length / head_count is {value}; convert the model anew."
            )
        return sizes | {"qk_nope_head_dim": key_length - rope, "qk_rope_head_dim": rope}

    def heads(self, heads: int) -> dict[str, Any]:
        head_dim = self.head_dim()
        stated = {} if head_dim is None else {"head_dim": head_dim}
        return {"num_key_value_heads": self.count("attention.head_count_kv", heads)} | stated

    def head_dim(self) -> int | None:
        keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
        given = {key: self.count(key) for key in keys if self.get(key) is not None}
        if len(set(given.values())) > 1:
            raise InputError(f"{self.path} has different {' and '.join(given)}, which is not supported.")
        return next(iter(given.values()), None)

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise InputError(f"{self.path} has {self._said(key, value)} where a positive whole number is needed.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, with the digits that a float32 has: 1e-05, not 9.999999747378752e-06."""
        value = self.get(key, default)
        if type(value) is float and 1e-37 < value < 1e38:  # a float32's range
            return float(str(np.float32(value)))
        raise InputError(f"{self.path} has {self._said(key, value)} where a positive number is needed.")

    def _said(self, key: str, value: Any) -> str:
        return f"{self.architecture}.{key} = {str(value):.60}" if value is not None else f"no {self.architecture}.{key}"
