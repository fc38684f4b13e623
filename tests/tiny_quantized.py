"""Quantized folders of any shape, written as the tools lay them out, beside a folder of the dequantized weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from weights_io.config import ModelConfig
from weights_io.files.safetensors import Computed, write_file
from weights_io.parameters import EMBEDDING, HEAD, is_router, module_name, parameters

Parts = dict[str, np.ndarray]
Tool = Callable[[np.random.Generator, int, int], tuple[Parts, np.ndarray]]  # -> the parts, and the matrix in float32

SHAPES: dict[str, dict[str, Any]] = {
    "2b": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4},
    "llama": {  # MiniCPM5's: the head dimension is not hidden size / heads
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"},
    },
    "minicpm3": {
        "architectures": ["MiniCPM3ForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0] * 8,
            "short_factor": [1.0] * 8,
            "original_max_position_embeddings": 64,
        },
    },
    "moe": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}
SCALES = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 32}


def write(
    folder: Path,
    shape: str,
    tool: Tool,
    entry: dict[str, Any],
    skip: tuple[str, ...] = ("embed_tokens", "lm_head"),
    seed: int = 0,
    tools: dict[str, Tool] | None = None,
    **changes: Any,
) -> tuple[Path, Path]:
    """Write the folders "packed" and "whole".

    Arguments:
        folder: where.
        shape: a key of `SHAPES`.
        tool: packs each matrix.
        entry: the ``quantization_config``.
        skip: parts of the names of matrices that are not packed; routers never are.
        tools: part of a name -> the tool for those matrices.
        changes: other keys of config.json.
    """
    raw: dict[str, Any] = {
        "architectures": ["MiniCPMForCausalLM"],
        "num_hidden_layers": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        **({} if shape == "llama" else SCALES),
        **SHAPES[shape],
        **changes,
    }
    config, random = ModelConfig.from_dict(raw), np.random.default_rng(seed)
    packed: Parts = {}
    whole: Parts = {}
    for p in parameters(config):
        for name in p.hf_names(config):
            module = module_name(name)
            if len(p.tensor_shape(config)) < 2 or is_router(p) or any(part in module for part in skip):
                array = random.normal(1 if p.init == "ones" else 0, 0.1, p.tensor_shape(config)).astype(np.float16)
                packed[name], whole[name] = array, array.astype(np.float32)
                continue
            own = next((each for part, each in (tools or {}).items() if part in module), tool)
            parts, whole[name] = own(random, *p.tensor_shape(config))
            packed |= {f"{module}.{part}": array for part, array in parts.items()}
    if config.tie_word_embeddings:
        assert HEAD.hf_name not in packed and EMBEDDING.hf_name in whole
    for out, tensors, more in (("packed", packed, {"quantization_config": entry}), ("whole", whole, {})):
        (folder / out).mkdir(parents=True)
        write_file(folder / out / "model.safetensors", {n: Computed.of(np.asarray(x)) for n, x in tensors.items()})
        settings = {**raw, **more, "torch_dtype": "float16" if more else "float32"}
        if "quant_method" not in entry and more:
            settings["quantization"] = entry
        (folder / out / "config.json").write_text(json.dumps(settings))
    return folder / "packed", folder / "whole"


def _scales(random: np.random.Generator, bits: int, *shape: int) -> np.ndarray:
    return (random.uniform(0.08, 0.32, shape) / (1 << bits)).astype(np.float16)


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n] as the 32-bit words of a stream, the lowest bit first."""
    stream = (codes[:, None] >> np.arange(bits) & 1).astype(np.uint8).reshape(-1)
    return np.packbits(stream, bitorder="little").view(np.int32)


def gptq(bits: int = 4, group: int = 32, sym: bool = False, act_order: bool = False, version: str = "gptq"):
    """AutoGPTQ, and its config entry. ``group`` -1: a whole row."""

    def tool(random: np.random.Generator, out: int, inputs: int) -> tuple[Parts, np.ndarray]:
        size = inputs if group == -1 else group
        codes, count = random.integers(0, 1 << bits, (inputs, out)), -(-inputs // size)  # the last may be smaller
        zeros = random.integers(1, 1 << bits, (count, out))
        zeros = np.full_like(zeros, 1 << (bits - 1)) if sym else zeros
        scales, g_idx = _scales(random, bits, count, out), np.arange(inputs) // size
        g_idx = random.permutation(g_idx) if act_order else g_idx
        stored = zeros - (version == "gptq")
        parts = {
            "qweight": np.stack([_words(column, bits) for column in codes.T], axis=1),
            "qzeros": np.stack([_words(row, bits) for row in stored]),
            "scales": scales,
            "g_idx": g_idx.astype(np.int32),
        }
        return parts, ((codes - zeros[g_idx]).astype(np.float32) * scales[g_idx].astype(np.float32)).T

    entry = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": act_order}
    return tool, {**entry, "checkpoint_format": version}


def awq(group: int = 128):
    """AutoAWQ's GEMM version."""

    def tool(random: np.random.Generator, out: int, inputs: int) -> tuple[Parts, np.ndarray]:
        size = inputs if group == -1 else group
        codes, zeros = random.integers(0, 16, (inputs, out)), random.integers(0, 16, (inputs // size, out))
        scales = _scales(random, 4, inputs // size, out)

        def words(numbers: np.ndarray) -> np.ndarray:
            columns = numbers.reshape(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].astype(np.uint32)
            return (columns << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)

        wide = (codes - np.repeat(zeros, size, 0)).astype(np.float32) * np.repeat(scales, size, 0).astype(np.float32)
        return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}, wide.T

    return tool, {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}


def bnb(kind: str = "nf4", double: bool = False, block: int = 64):
    """bitsandbytes in 4 bits; ``block`` numbers of the flattened matrix share a scale."""

    def tool(random: np.random.Generator, out: int, inputs: int) -> tuple[Parts, np.ndarray]:
        size = out * inputs
        table = np.sort(np.random.default_rng(5).uniform(-1, 1, 16)).astype(np.float32)
        codes, blocks = random.integers(0, 16, size), -(-size // block)
        state = {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": [out, inputs]}
        parts = {"weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None], "weight.quant_map": table}
        absmax = random.uniform(0.05, 0.2, blocks).astype(np.float32)
        if double:
            stored, levels = random.integers(0, 256, blocks).astype(np.uint8), random.uniform(0, 1, 256)
            nested = random.uniform(0.05, 0.2, -(-blocks // 256)).astype(np.float32)
            parts |= {"weight.nested_absmax": nested, "weight.nested_quant_map": levels.astype(np.float32)}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0625}
            absmax = levels.astype(np.float32)[stored] * nested[np.arange(blocks) // 256] + np.float32(0.0625)
        parts["weight.absmax"] = stored if double else absmax
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        return parts, (table[codes] * absmax[np.arange(size) // block]).reshape(out, inputs)

    return tool, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}


def bnb_int8():
    """bitsandbytes' LLM.int8."""

    def tool(random: np.random.Generator, out: int, inputs: int) -> tuple[Parts, np.ndarray]:
        codes, largest = random.integers(-127, 128, (out, inputs)).astype(np.int8), random.uniform(0.1, 0.4, out)
        largest = largest.astype(np.float32)
        wide = codes.astype(np.float32) * largest[:, None] * np.float32(1 / 127)
        return {"weight": codes, "SCB": largest, "weight_format": np.uint8(0)}, wide

    return tool, {"quant_method": "bitsandbytes", "load_in_8bit": True}


def mlx(bits: int = 4, group: int = 64):
    """mlx_lm's affine format."""

    def tool(random: np.random.Generator, out: int, inputs: int) -> tuple[Parts, np.ndarray]:
        codes, scales = random.integers(0, 1 << bits, (out, inputs)), _scales(random, bits, out, inputs // group)
        biases = (-scales.astype(np.float32) * ((1 << bits) / 2)).astype(np.float16)
        wide = codes.astype(np.float32) * np.repeat(scales, group, 1).astype(np.float32)
        wide += np.repeat(biases, group, 1).astype(np.float32)
        words = np.stack([_words(row, bits) for row in codes]).view(np.uint32)
        return {"weight": words, "scales": scales, "biases": biases}, wide

    return tool, {"group_size": group, "bits": bits, "mode": "affine"}
