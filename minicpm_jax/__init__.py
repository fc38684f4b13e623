"""MiniCPM in JAX/Flax: models, generation and training for TPU (and any other device that JAX runs on)."""

import importlib.util

from minicpm_jax.libtpu import tell_libtpu
from weights_io import lazy_exports

if importlib.util.find_spec("jax") is None or importlib.util.find_spec("flax") is None:
    raise ImportError("minicpm_jax needs JAX and Flax: pip install 'minicpm-jax-mlx[jax]' (on a TPU: [tpu]).")

tell_libtpu()
__getattr__ = lazy_exports.install(
    __name__,
    {
        "Model": "model",
        "load": "loading",
        "generate": "generate",
        "stream_generate": "generate",
        "batch_generate": "generate",
        "chat": "chat",
        "activation_sparsity": "generation.sparsity",
    },
)
