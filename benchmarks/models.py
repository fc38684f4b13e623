"""Models of MiniCPM-1B's width with random weights, of as many layers and words as a benchmark can afford."""

from typing import Any

from minicpm_data.generation import Backend
from minicpm_serve import backends
from minicpm_serve.backends import BackendName
from weights_io.config import ModelConfig

# config.json of openbmb/MiniCPM-1B-sft-bf16: 52 layers, 73,440 words.
WIDE: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 3840,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "tie_word_embeddings": True,
    "model_type": "minicpm",
}


def wide(layers: int, words: int, **changes: Any) -> dict[str, Any]:
    """A config.json; no token ends an answer."""
    return WIDE | {"num_hidden_layers": layers, "vocab_size": words, "eos_token_id": None} | changes


def random_model(name: BackendName, raw: dict[str, Any], seed: int = 0, dtype: str = "float32") -> tuple[Backend, Any]:
    """The backend of that name, and a model in the form that decodes fastest there."""
    running, module, config = backends.get(name), backends.module(name, "model"), ModelConfig.from_dict(raw)
    if name == "jax":
        import jax

        key: Any = jax.random.key(seed)
    else:
        import mlx.core as mx

        key = mx.random.key(seed)
    model = module.initialise(config, key, dtype)
    return running, running.device.for_decoding(model)
