"""The family's released checkpoints by short name, with what is known of each one without a download.

Parameter counts are sums over the tensor shapes. They were checked against the paper (arXiv 2404.06395, table 2) or the
sizes of the released files. ``None`` means unknown: config.json decides.

    python -m weights_io.catalog
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights_io.built_in import built_in
from weights_io.config import ModelConfig
from weights_io.memory import ITEM, cache_bytes, packed_bytes, size, weight_bytes


@dataclass(frozen=True)
class Entry:
    """One released checkpoint."""

    name: str  # the short name that every --model accepts
    repo: str | None  # Hugging Face repository; None: included in this package
    architecture: str  # its model_type; one of `FAMILIES`
    parameters: int | None  # exact; None: unknown
    dtype: str | None  # of the stored weights; None: unknown
    notes: str = ""
    modelscope: str | None = None  # repository on ModelScope; None: unknown
    config: Mapping[str, Any] | None = None  # the keys of config.json that are known; None: shape unknown
    quantization: Mapping[str, Any] | None = None  # what is known of its quantization_config; None: it has none

    def model_config(self) -> ModelConfig | None:
        """The config that is known without a download, or None. Raises `InputError` for an unknown architecture."""
        if self.repo is None:
            return ModelConfig.from_file(built_in(self.name) / "config.json")
        return None if self.config is None else ModelConfig.from_dict(dict(self.config), self.name)


def _released(name: str) -> dict[str, Any]:
    """The config.json of a checkpoint: as released, or the keys that are known of it."""
    return json.loads((Path(__file__).parent / "released" / f"{name}.json").read_text("utf-8"))


def _text(
    name: str, repo: str, parameters: int, notes: str, modelscope: str | None = "OpenBMB", config: Any = None
) -> Entry:
    """A text model in bfloat16. ``config``: None is the file in released/."""
    config = _released(name) if config is None else config
    kinds = {"LlamaForCausalLM": "llama", "MiniCPM3ForCausalLM": "minicpm3"}
    architecture = kinds.get(config["architectures"][0], "minicpm")
    mirror = modelscope and f"{modelscope}/{repo}"
    return Entry(name, f"openbmb/{repo}", architecture, parameters, "bfloat16", notes, mirror, config)


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
_V2 = _released("minicpm-v-2")
_SLICED = ("slice_mode", "patch_size", "max_slice_nums", "scale_resolution", "mm_use_im_start_end")
_V1 = {key: value for key, value in _V2.items() if key not in _SLICED} | {"max_position_embeddings": 2048}
_NV = 3_434_965_792
_SCALES = {"scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4}
_COMMON = {
    "architectures": ["MiniCPMForCausalLM"],
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **_SCALES,
}
_2B = _COMMON | {
    "vocab_size": 122753,
    "hidden_size": 2304,
    "intermediate_size": 5760,
    "num_hidden_layers": 40,
    "num_attention_heads": 36,
    "num_key_value_heads": 36,
    "max_position_embeddings": 4096,
}
_1B = _COMMON | {
    "vocab_size": 73440,
    "hidden_size": 1536,
    "intermediate_size": 3840,
    "num_hidden_layers": 52,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
_128K = _2B | {
    "vocab_size": 122760,
    "max_position_embeddings": 65536,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "dynamic", "factor": 4.0},
    "tie_word_embeddings": False,
}
_MOE = _2B | {"num_experts": 8, "num_experts_per_tok": 2, "rope_scaling": None}
# The scales are folded into the weights, so the head is no longer tied to the embedding.
_2B_LLAMA = {key: value for key, value in _2B.items() if key not in _SCALES} | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": False,
}
_BF16, _FP16, _FP32 = ({"torch_dtype": dtype} for dtype in ("bfloat16", "float16", "float32"))
_N2B, _N2B_UNTIED, _N1B = 2_724_880_896, 3_007_703_808, 1_360_246_272
_N4, _N4_SMALL = 8_185_253_888, 433_873_920  # 8B and 0.5B
_TERNARY = "chat; ternary weights, stored as floats"

CATALOG: tuple[Entry, ...] = (
    Entry("pico", None, "minicpm", 1_296_000, "float32", "built in; small enough for a laptop's CPU"),
    Entry(
        "pico-tools", None, "minicpm", 1_296_000, "bfloat16", "built in; pico taught to call a calculator and a timer"
    ),
    Entry(
        "minicpm-2b",
        "openbmb/MiniCPM-2B-sft-bf16",
        "minicpm",
        _N2B,
        "bfloat16",
        "chat",
        "OpenBMB/miniCPM-bf16",
        _2B | _BF16,
    ),
    Entry("minicpm-2b-fp32", "openbmb/MiniCPM-2B-sft-fp32", "minicpm", _N2B, "float32", "chat", config=_2B | _FP32),
    Entry(
        "minicpm-2b-dpo",
        "openbmb/MiniCPM-2B-dpo-bf16",
        "minicpm",
        _N2B,
        "bfloat16",
        "chat, preference-tuned",
        "OpenBMB/MiniCPM-2B-dpo-bf16",
        _2B | _BF16,
    ),
    Entry(
        "minicpm-2b-dpo-fp16",
        "openbmb/MiniCPM-2B-dpo-fp16",
        "minicpm",
        _N2B,
        "float16",
        "chat, preference-tuned",
        config=_2B | _FP16,
    ),
    Entry(
        "minicpm-2b-dpo-fp32",
        "openbmb/MiniCPM-2B-dpo-fp32",
        "minicpm",
        _N2B,
        "float32",
        "chat, preference-tuned",
        config=_2B | _FP32,
    ),
    Entry(
        "minicpm-2b-llama",
        "openbmb/MiniCPM-2B-sft-bf16-llama-format",
        "llama",
        _N2B_UNTIED,
        "bfloat16",
        "minicpm-2b with its scales folded into the weights",
        config=_2B_LLAMA | _BF16,
    ),
    Entry(
        "minicpm-2b-llama-fp32",
        "openbmb/MiniCPM-2B-sft-fp32-llama-format",
        "llama",
        _N2B_UNTIED,
        "float32",
        "minicpm-2b-fp32 with its scales folded into the weights",
        config=_2B_LLAMA | _FP32,
    ),
    Entry(
        "minicpm-2b-dpo-llama",
        "openbmb/MiniCPM-2B-dpo-bf16-llama-format",
        "llama",
        _N2B_UNTIED,
        "bfloat16",
        "minicpm-2b-dpo with its scales folded into the weights",
        config=_2B_LLAMA | _BF16,
    ),
    Entry(
        "minicpm-2b-mlx",
        "mlx-community/MiniCPM-2B-sft-bf16-llama-format-mlx",
        "llama",
        _N2B_UNTIED,
        None,
        "minicpm-2b-llama as converted for MLX",
        config=_2B_LLAMA,
    ),
    Entry(
        "minicpm-2b-int4",
        "openbmb/MiniCPM-2B-sft-int4",
        "minicpm",
        _N2B,
        None,
        "GPTQ, 4 bits, groups of 32",
        quantization=_GPTQ,
    ),
    Entry(
        "minicpm-2b-dpo-int4",
        "openbmb/MiniCPM-2B-dpo-int4",
        "minicpm",
        _N2B,
        None,
        "GPTQ, 4 bits, groups of 32",
        quantization=_GPTQ,
    ),
    Entry(
        "minicpm-2b-history",
        "openbmb/MiniCPM-2B-history",
        "minicpm",
        _N2B,
        None,
        "base; 30 checkpoints of the pretraining run, every 10,000 steps: choose one by revision or folder",
        config=_2B,
    ),
    Entry(
        "minicpm-2b-128k",
        "openbmb/MiniCPM-2B-128k",
        "minicpm",
        3_007_736_064,
        "bfloat16",
        "chat, long context",
        "openbmb/MiniCPM-2B-128k",
        _128K | _BF16,
    ),
    Entry(
        "minicpm-1b",
        "openbmb/MiniCPM-1B-sft-bf16",
        "minicpm",
        _N1B,
        "bfloat16",
        "chat",
        "OpenBMB/MiniCPM-1B-sft-bf16",
        _1B | _BF16,
    ),
    Entry(
        "minicpm-s-1b",
        "openbmb/MiniCPM-S-1B-sft",
        "minicpm",
        _N1B,
        "bfloat16",
        "chat; sparse activation (FATReLU) whose threshold only its config.json tells",
        "OpenBMB/MiniCPM-S-1B-sft",
    ),
    Entry(
        "minicpm-s-1b-llama",
        "openbmb/MiniCPM-S-1B-sft-llama-format",
        "llama",
        None,
        None,
        "minicpm-s-1b with its scales folded into the weights",
    ),
    Entry(
        "minicpm-moe-8x2b",
        "openbmb/MiniCPM-MoE-8x2B",
        "minicpm",
        13_873_291_776,
        "bfloat16",
        "chat; 2 of 8 experts a token",
        "OpenBMB/MiniCPM-MoE-8x2B",
        _MOE | _BF16,
    ),
    Entry("minicpm-v", "openbmb/MiniCPM-V", "minicpmv", _NV, "bfloat16", "images, whole", "OpenBMB/MiniCPM-V", _V1),
    Entry("minicpm-v-2", "openbmb/MiniCPM-V-2", "minicpmv", _NV, "bfloat16", "images, sliced", config=_V2),
    Entry("omnilmm-12b", "openbmb/OmniLMM-12B", "omnilmm", None, None, "images; its decoder is Mistral-7B's"),
    _text("minicpm3-4b", "MiniCPM3-4B", 4_073_875_968, "chat; latent attention, whose cache is small"),
    _text("minicpm4-0.5b", "MiniCPM4-0.5B", _N4_SMALL, "chat, LongRoPE"),
    _text("minicpm4-8b", "MiniCPM4-8B", _N4, "chat, LongRoPE; dense attention"),
    _text("minicpm4.1-8b", "MiniCPM4.1-8B", _N4, "chat with thinking, LongRoPE; dense attention", None),
    _text("bitcpm4-0.5b", "BitCPM4-0.5B", _N4_SMALL, _TERNARY, config=_released("minicpm4-0.5b")),
    _text("bitcpm4-1b", "BitCPM4-1B", 1_360_258_560, _TERNARY, config=_1B | {"vocab_size": 73448} | _BF16),
    _text("minicpm5-1b", "MiniCPM5-1B", 1_080_632_832, "chat with thinking", None),
    _text("minicpm5-2b", "MiniCPM5-2B", 2_516_756_480, "chat with thinking", None),
)
_SHAPES = {"minicpm-s-1b": _1B}  # enough for memory estimates where the config is only partly known
# The flags besides --model with which a command runs on the least hardware.
FLAGS = {
    "minicpm-2b-fp32": "--dtype bfloat16",
    "minicpm-2b-dpo-fp32": "--dtype bfloat16",
    "minicpm-2b-llama-fp32": "--dtype bfloat16",
    "minicpm-2b-history": "--revision REVISION",
    "minicpm-2b-128k": "--kv-bits 8",
}
# Short name -> folders in tests/reference: small checkpoints of the same form, with the original code's logits. A name
# also covers all names that begin with it, unless a longer one covers them. The built-in model has none.
CHECKED = {
    "minicpm-2b": "dense_2b dense_bf16",
    "minicpm-2b-int4": "quant/gptq_int4_g32_asym_desc_act",
    "minicpm-2b-dpo-int4": "quant/gptq_int4_g32_asym_desc_act",
    "minicpm-2b-llama": "llama_format",
    "minicpm-2b-dpo-llama": "llama_format",
    "minicpm-2b-mlx": "llama_format",
    "minicpm-2b-128k": "long_128k long_linear dense_untied",
    "minicpm-1b": "dense_1b",
    "minicpm-s-1b": "s_1b",
    "minicpm-moe-8x2b": "moe_8x2b",
    "minicpm-v": "vision/v1",
    "minicpm-v-2": "vision/v2",
    "omnilmm-12b": "vision/omnilmm",
    "minicpm3-4b": "minicpm3 minicpm3_scaled minicpm3_untied",
    "minicpm4-0.5b": "minicpm4_05b minicpm4_scaled",
    "minicpm4": "minicpm4_8b minicpm4_scaled minicpm4_sparse",
    "bitcpm4": "minicpm4_05b",
    "minicpm5": "minicpm5",
}
_BY_NAME = {entry.name: entry for entry in CATALOG}


def find(name: str) -> Entry | None:
    """The entry with this short name (in any case) or this Hugging Face repository; None if there is none."""
    return _BY_NAME.get(name.lower()) or next((entry for entry in CATALOG if entry.repo == name), None)


def nearest(name: str) -> list[str]:
    """Up to three short names that resemble ``name``, or whose repositories do. Names that begin with it come first."""
    typed = name.lower().rpartition("/")[2]
    spellings = {key.lower(): entry.name for entry in CATALOG for key in (_tail(entry.repo), entry.name) if key}
    begun = sorted((key for key in spellings if typed and key.startswith(typed)), key=len)
    return list(dict.fromkeys(spellings[key] for key in begun + difflib.get_close_matches(typed, spellings)))[:3]


def _tail(repo: str | None) -> str:
    return (repo or "").rpartition("/")[2]


@dataclass(frozen=True)
class Options:
    markdown: bool = False
    """Print the tables of docs/models.md: all checkpoints, and the command and memory to run each one."""


def main(options: Options) -> None:
    """Print the short names that every --model accepts, each with parameters, dtype, bytes of all weights,
    repository and notes."""
    print("\n".join((*markdown(), "", *how_to_run()) if options.markdown else lines()))


def lines() -> Iterator[str]:
    """The table for a terminal."""
    for entry in CATALOG:
        count = "unknown" if entry.parameters is None else f"{entry.parameters / 1e6:,.0f} M"
        held, where = size(_weights(entry)), entry.repo or "built in"
        line = f"{entry.name:22} {count:>9}  {entry.dtype or 'unknown':9} {held:>8}  {where:51} {entry.notes}"
        yield line.rstrip()


def markdown() -> Iterator[str]:
    """The first table of docs/models.md."""
    yield "| `--model` | repository | parameters | weights as stored | cache of 1,000 tokens | |"
    yield "|---|---|---|---|---|---|"
    for entry in CATALOG:
        count = "unknown" if entry.parameters is None else f"{entry.parameters:,}"
        held, dtype = size(_weights(entry)), entry.dtype or "unknown"
        weights = dtype if held == "unknown" else f"{held}, {dtype}"
        config = _config(entry)
        cache = size(None if config is None else cache_bytes(config, 1000, "bfloat16"))
        where = entry.repo or "in this package"
        yield f"| `{entry.name}` | {where} | {count} | {weights} | {cache} | {entry.notes} |"


def how_to_run() -> Iterator[str]:
    """The second table of docs/models.md: memory with a conversation of 4,096 tokens, in bfloat16, 8 and 4 bits."""
    yield "| `--model` | command | bfloat16 | 8 bits | 4 bits | logits checked on |"
    yield "|---|---|---|---|---|---|"
    for entry in CATALOG:
        flags = " ".join(["--model", entry.name, *FLAGS.get(entry.name, "").split(), '--prompt "Hello!"'])
        config, held = _config(entry), 3 * ["unknown"]
        if config is not None:
            cache = cache_bytes(config, 4096, "bfloat16")
            packed = [packed_bytes(config, "bfloat16", bits, head=True) for bits in (8, 4)]
            held = [size(weights + cache) for weights in (weight_bytes(config, "bfloat16"), *packed)]
        checked = CHECKED.get(max((name for name in CHECKED if entry.name.startswith(name)), key=len, default=""), "")
        folders = ", ".join(f"`{folder}`" for folder in checked.split())
        yield f"| `{entry.name}` | `python -m minicpm_jax.generate {flags}` | {' | '.join(held)} | {folders} |"


def _weights(entry: Entry) -> int | None:
    """Bytes of the stored weights; None: unknown."""
    return None if entry.parameters is None or entry.dtype is None else entry.parameters * ITEM[entry.dtype]


def _config(entry: Entry) -> ModelConfig | None:
    if entry.name in _SHAPES:
        return ModelConfig.from_dict(dict(_SHAPES[entry.name]))
    return entry.model_config()


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m weights_io.catalog")
