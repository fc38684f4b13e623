"""Random models of MiniCPM-1B's width, with as many layers and as large a vocabulary as a benchmark can afford."""

import functools
from pathlib import Path
from typing import Any

from minicpm_data.generation.api import Backend
from minicpm_serve import backends
from minicpm_serve.backends import BackendName
from weights_io import catalog
from weights_io.built_in import built_in
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.json_text import read_json

# Keys that must be explicit, because other programs have other defaults.
THEIRS = {"model_type": "minicpm", "tie_word_embeddings": True}


def shape_of(name: str) -> dict[str, Any]:
    """The config.json of a model from the catalogue. Raises `InputError` if its shape is not known."""
    entry = catalog.find(name)
    if name == "pico":
        return read_json(built_in() / "config.json")
    if entry is None or entry.config is None:
        raise InputError(f"the shape of {name} is not known; give a model of the catalogue whose is.")
    return dict(entry.config)


def wide(layers: int, words: int, **changes: Any) -> dict[str, Any]:
    """A config.json of MiniCPM-1B's width, without an EOS token. ``words``: the vocabulary size."""
    shape = {"num_hidden_layers": layers, "vocab_size": words, "eos_token_id": None}
    return shape_of("minicpm-1b") | THEIRS | shape | changes


def random_model(name: BackendName, raw: dict[str, Any], seed: int = 0, join: bool = True) -> tuple[Backend, Any]:
    """The backend and a random float32 model. ``join``: convert the model to the backend's form for decoding."""
    running, module, config = backends.get(name), backends.module(name, "model"), ModelConfig.from_dict(raw)
    if name == "jax":
        import jax

        key: Any = jax.random.key(seed)
    else:
        import mlx.core as mx

        key = mx.random.key(seed)
    model = module.initialize(config, key)
    return running, running.for_decoding(model) if join else model


def write_llama(folder: Path, raw: dict[str, Any], dtype: str) -> None:
    """Write a random Llama: the folder ``model`` (safetensors) and, for llama.cpp, ``model.gguf``."""
    import numpy as np

    from weights_io.casting import numpy_dtype
    from weights_io.files.safetensors import Computed
    from weights_io.llama_format import to_llama
    from weights_io.parameters import parameters
    from weights_io.write import save_checkpoint

    config, random = ModelConfig.from_dict(raw), np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for p in parameters(config):
        for name in p.hf_names(config):
            array = random.normal(0, p.init_std(config), p.tensor_shape(config)).astype(numpy_dtype(dtype))
            array = np.ones_like(array) if p.init == "ones" else array
            tensors[name] = Computed(array.shape, array.dtype, functools.partial(np.asarray, array))
    llama, folded = to_llama(config, tensors, dtype)
    save_checkpoint(folder / "model", llama, folded, raw_config=raw | {"torch_dtype": dtype})
    write_gguf(folder / "model.gguf", llama, {name: tensor.read() for name, tensor in folded.items()}, dtype)


def write_noise(folder: Path, raw: dict[str, Any], dtype: str) -> None:
    """Write a Llama with one tensor at a time in memory: every tensor repeats the same noise. Writes no GGUF file."""
    import numpy as np

    from weights_io.casting import numpy_dtype
    from weights_io.files.safetensors import Computed
    from weights_io.llama_format import to_llama
    from weights_io.parameters import tensor_shapes
    from weights_io.write import save_checkpoint

    config, kind = ModelConfig.from_dict(raw), numpy_dtype(dtype)
    noise = np.random.default_rng(0).normal(0, config.initializer_range, 1 << 20).astype(kind)
    tensors: dict[str, Any] = {
        name: Computed(shape, kind, functools.partial(np.resize, noise, shape)) for name, shape in tensor_shapes(config)
    }
    llama, folded = to_llama(config, tensors, dtype)
    save_checkpoint(folder / "model", llama, folded, raw_config=raw | {"torch_dtype": dtype})


def write_gguf(path: Path, config: ModelConfig, tensors: dict[str, Any], dtype: str) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, array in tensors.items():
        written = names.get_name(name, try_suffixes=(".weight",)) or name
        if dtype == "float32" or array.ndim == 1:
            writer.add_tensor(written, array.astype(np.float32))
        else:
            writer.add_tensor(written, array.view(np.uint16), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
