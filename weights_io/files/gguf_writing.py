"""Write a model as a GGUF file, for llama.cpp and the programs that are made of it.

Names and meaning of the keys follow llama.cpp's own conversion, of which `gguf_config` is the reader. The file is
written by ``gguf.GGUFWriter``, one tensor at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.gguf import LAYER_MODULES, MODULES
from weights_io.files.gguf_blocks import SUPER, quantize
from weights_io.files.gguf_config import ARCHITECTURES, LATENT, LONGROPE
from weights_io.files.partial import partial, write_whole
from weights_io.files.tensor import LazyTensor
from weights_io.parameters import HEAD
from weights_io.progress import progress_bar
from weights_io.rope_config import LongRoPE
from weights_io.write import check_space, folder_to_fill, unwritable

OutType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"]
OUT_TYPES: tuple[str, ...] = get_args(OutType)
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k_m": 15, "bf16": 32}  # llama.cpp's llama_ftype
SMALL = 32  # weights of a block that is not a super-block
# Where rows do not fill super-blocks, llama.cpp takes these.
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor to write: its ggml name and kind, and the numbers in llama.cpp's order."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def check_config(config: ModelConfig) -> None:
    """Raises `InputError` where GGUF has no place for a setting of the model."""
    if config.vision is not None:
        raise InputError("a model that sees is not written as GGUF; use --to hf or --to mlx.")
    if config.num_experts:
        raise InputError("llama.cpp has no experts in its MiniCPM; --to gguf writes dense models.")
    if config.hidden_act != "silu":
        raise InputError(f"llama.cpp computes silu, and this model {config.hidden_act}; no GGUF file can say so.")
    scaling = config.rope_scaling
    if scaling is not None and not isinstance(scaling, LongRoPE) and scaling.type != "linear":
        raise InputError(f"GGUF has no RoPE scaling of the type {scaling.type}; linear and longrope are written.")


def save(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    out_type: OutType,
    tokenizer: Mapping[str, Any],
    name: str,
    beside: Mapping[str, str] | None = None,
) -> list[GGUFTensor]:
    """Write a GGUF file. It appears only when it is complete.

    Arguments:
        path: of the file.
        config: the model's.
        tensors: Hugging Face name -> tensor, for every name of the parameter table.
        out_type: kind of the matrices.
        tokenizer: key -> value of the tokenizer (`minicpm_data.tokenizer.gguf_writing.metadata_of`).
        name: the model's name, for ``general.name``.
        beside: file name -> text of other files in the same folder.

    Returns:
        What was written.

    Raises:
        InputError: as `check_config`; or the file or one beside it exists, or cannot be written.
    """
    check_config(config)
    path = Path(path).expanduser().absolute()
    if taken := [file for file in (path, *(path.parent / other for other in beside or ())) if file.exists()]:
        raise InputError(f"{taken[0]} exists; choose another name or remove it first.")
    try:
        with folder_to_fill(path.parent):
            check_space(path, sum(_bytes_of(tensor) for tensor in tensors_of(config, tensors, out_type)))
            written = _write(path, config, tensors, out_type, tokenizer, name)
            for other, text in (beside or {}).items():
                write_whole(path.parent / other, text)
    except OSError as error:
        raise unwritable(path, error) from error
    return written


def _write(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    out_type: OutType,
    tokenizer: Mapping[str, Any],
    name: str,
) -> list[GGUFTensor]:
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    listed = tensors_of(config, tensors, out_type)
    sizes = [_bytes_of(tensor) for tensor in listed]
    with partial(path) as unfinished:
        writer = GGUFWriter(unfinished, architecture_of(config))
        for key, value in {**metadata_of(config, out_type, name), **tokenizer}.items():
            _add(writer, key, value, GGUFValueType)
        for tensor, size in zip(listed, sizes, strict=True):
            kind = GGMLQuantizationType[tensor.kind]
            stored = np.dtype(np.float32 if tensor.kind == "F32" else np.float16 if tensor.kind == "F16" else np.uint8)
            shape = (
                tensor.shape if stored != np.uint8 else (*tensor.shape[:-1], size // int(np.prod(tensor.shape[:-1])))
            )
            writer.add_tensor_info(tensor.name, shape, stored, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress_bar(path.name, sum(sizes)) as bar:
            for tensor, size in zip(listed, sizes, strict=True):
                writer.write_tensor_data(quantize(tensor.make(), tensor.kind))
                bar.update(size)
        writer.close()
    return listed


def architecture_of(config: ModelConfig) -> str:
    """llama.cpp's name of the model's kind."""
    return {"MiniCPM3ForCausalLM": "minicpm3", "LlamaForCausalLM": "llama"}.get(config.family.architecture, "minicpm")


def metadata_of(config: ModelConfig, out_type: OutType, name: str) -> dict[str, Any]:
    """The keys of the model. Floats are stored as float32, whole numbers as uint32."""
    architecture = architecture_of(config)
    assert architecture in ARCHITECTURES
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.rope_dim,
        "vocab_size": config.vocab_size,
    }
    if config.is_latent:
        values |= {name: getattr(config, field) for field, name in LATENT.items()}
        values["attention.key_length"] = config.qk_nope_head_dim + config.qk_rope_head_dim
        values["attention.value_length"] = config.head_dim
    elif config.head_dim * config.num_attention_heads != config.hidden_size:
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if config.family.scaled:
        values |= {
            "embedding_scale": config.embedding_scale,
            "residual_scale": config.residual_scale,
            "logit_scale": config.logit_divisor,
        }
    scaling = config.rope_scaling
    if isinstance(scaling, LongRoPE):
        values["rope.scaling.type"] = "longrope"
        values["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
        values["rope.scaling.attn_factor"] = config.rope_amplitude
    elif scaling is not None:
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    general = {"type": "model", "name": name, "file_type": FILE_TYPES[out_type], "quantization_version": 2}
    return {f"general.{key}": value for key, value in general.items()} | {
        f"{architecture}.{key}": value for key, value in values.items()
    }


def tensors_of(config: ModelConfig, tensors: Mapping[str, LazyTensor], out_type: OutType) -> list[GGUFTensor]:
    """The tensors in llama.cpp's names, order of rows and kinds. Tables of LongRoPE's factors are tensors there."""
    found = []
    if isinstance(config.rope_scaling, LongRoPE):
        for field, name in LONGROPE.items():
            factors = np.asarray(getattr(config.rope_scaling, field), np.float32)
            found.append(GGUFTensor(name, "F32", factors.shape, factors.copy))
    heads = {} if config.is_latent else {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in tensors.items():
        if name == HEAD.hf_name and config.tie_word_embeddings:
            continue
        module = name.removesuffix(".weight")
        stored = _gguf_name(module)
        permuted = heads.get(module.rpartition(".")[2], 0)

        def make(tensor: LazyTensor = tensor, heads: int = permuted) -> np.ndarray:
            array = np.asarray(tensor.read(), np.float32)
            return _interleaved(array, heads) if heads else array

        shape = tuple(tensor.shape)
        found.append(GGUFTensor(f"{stored}.weight", kind_of(config, stored, shape, out_type), shape, make))
    return found


def kind_of(config: ModelConfig, name: str, shape: tuple[int, ...], out_type: OutType) -> str:
    """The ggml kind of a tensor: llama.cpp's choice (``llama_tensor_get_type``) for a file of this type."""
    if len(shape) == 1 or out_type == "f32":
        return "F32"
    if out_type in ("f16", "bf16", "q8_0"):
        kind = out_type.upper()
    elif name == ("token_embd" if config.tie_word_embeddings else "output"):
        kind = "Q6_K"
    elif out_type == "q4_0":
        kind = "Q4_0"
    else:
        better = name.endswith(("attn_v", "attn_kv_b", "ffn_down")) and _more_bits(name, config.num_hidden_layers)
        kind = "Q6_K" if better else "Q4_K"
    if kind in FALLBACK and shape[-1] % SUPER:
        kind = FALLBACK[kind]
    return "F16" if kind.startswith("Q") and shape[-1] % SMALL else kind


def _more_bits(name: str, layers: int) -> bool:
    """Whether q4_k_m spends more bits on this layer: the first and the last eighth, and every third between."""
    layer = int(name.split(".")[1])
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _gguf_name(module: str) -> str:
    if module.startswith("model.layers."):
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{_OF_LAYER[rest]}"
    return _OF_MODEL[module]


_OF_MODEL = {hf: stored for stored, hf in MODULES.items()}
_OF_LAYER = {hf: stored for stored, hf in LAYER_MODULES.items()}


def _interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a q or k projection as `weights_io.files.gguf.UnpermutedTensor` expects them."""
    return array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)


def _bytes_of(tensor: GGUFTensor) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.kind]]
    return int(np.prod(tensor.shape)) // elements * size


def _add(writer: Any, key: str, value: Any, types: Any) -> None:
    """A key with the type that llama.cpp expects of it."""
    of_item = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING}
    if key == "general.architecture":  # GGUFWriter has written it
        return
    if isinstance(value, list):
        kind = types.INT32 if key.endswith("token_type") else of_item[type(value[0])]
        writer.add_key_value(key, value, types.ARRAY, kind)
    else:
        writer.add_key_value(key, value, of_item[type(value)])
