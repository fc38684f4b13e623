"""A checkpoint of a few thousand random weights with a tokenizer: it babbles, but it generates."""

from pathlib import Path

import numpy as np
import tiny_tokenizer

from minicpm_data import load_tokenizer
from weights_io.casting import numpy_dtype
from weights_io.config import ModelConfig
from weights_io.files.safetensors import Computed
from weights_io.parameters import parameters
from weights_io.write import save_checkpoint


def write(folder: Path, seed: int = 0, dtype: str = "float32", **changes) -> Path:
    """A model folder; ``dtype``: float32 or bfloat16, of its weights; ``changes`` are keys of its config."""
    tiny_tokenizer.write(folder / "tokenizer")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    scales = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16, "initializer_range": 0.1}
    if changes.get("model_type") == "llama":  # it has no such scales
        scales = {"initializer_range": 0.1}
    rows = load_tokenizer(folder / "tokenizer").vocab_size
    raw = {"num_key_value_heads": 2, "vocab_size": rows, "eos_token_id": 2, **shape, **scales, **changes}
    config = ModelConfig.from_dict(raw)
    random = np.random.default_rng(seed)
    tensors = {}
    for p in parameters(config):
        for name in p.hf_names(config):
            array = random.normal(0, p.init_std(config), p.tensor_shape(config)).astype(numpy_dtype(dtype))
            array = np.ones_like(array) if p.init == "ones" else array
            tensors[name] = Computed(array.shape, array.dtype, lambda array=array: array)
    save_checkpoint(folder / "model", config, tensors, raw_config=raw, copy_from=folder / "tokenizer")
    return folder / "model"
