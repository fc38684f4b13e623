"""MiniCPM in MLX: models, generation and training on Apple silicon (and on Linux, where MLX runs on the CPU)."""

import importlib.util
from typing import TYPE_CHECKING

from minicpm_mlx import open_files
from weights_io import lazy_exports

# `mlx` is a namespace package: a leftover folder of that name is found without MLX in it.
if importlib.util.find_spec("mlx") is None or importlib.util.find_spec("mlx.core") is None:
    raise ImportError("minicpm_mlx needs MLX: pip install 'minicpm-jax-mlx[mlx]'.")

open_files.let_mlx_lm_ask()

if TYPE_CHECKING:
    from minicpm_mlx.chat import chat as chat
    from minicpm_mlx.generate import batch_generate as batch_generate
    from minicpm_mlx.generate import generate as generate
    from minicpm_mlx.generate import stream_generate as stream_generate
    from minicpm_mlx.generation.sparsity import activation_sparsity as activation_sparsity
    from minicpm_mlx.loading import load as load
    from minicpm_mlx.model import Model as Model
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
