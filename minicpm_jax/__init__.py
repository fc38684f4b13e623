"""MiniCPM in JAX/Flax: models, generation and training for TPU (and any other device that JAX runs on)."""

import importlib.util
from typing import TYPE_CHECKING

from minicpm_jax.aot.libtpu import tell_libtpu
from weights_io import lazy_exports

if importlib.util.find_spec("jax") is None or importlib.util.find_spec("flax") is None:
    raise ImportError("minicpm_jax needs JAX and Flax: pip install 'minicpm-jax-mlx[jax]' (on a TPU: [tpu]).")

tell_libtpu()
if TYPE_CHECKING:
    from minicpm_jax.chat import chat as chat
    from minicpm_jax.generate import batch_generate as batch_generate
    from minicpm_jax.generate import generate as generate
    from minicpm_jax.generate import stream_generate as stream_generate
    from minicpm_jax.generation.sparsity import activation_sparsity as activation_sparsity
    from minicpm_jax.loading import load as load
    from minicpm_jax.model import Model as Model
else:
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
