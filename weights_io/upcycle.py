"""Sparse upcycling (arXiv 2212.05055): convert a dense model to a mixture of experts, to continue training.

    python -m weights_io.upcycle --model openbmb/MiniCPM-2B-sft-bf16 --num-experts 8 --save-path minicpm-moe-8x2b

Every MLP becomes E exact copies of itself behind a random router. The weights of the selected experts add up to 1, so
the logits stay the same until the model is trained. MiniCPM-MoE was made this way (arXiv 2404.06395).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from weights_io.checkpoint import Checkpoint
from weights_io.command_line import Former
from weights_io.config import MAX_EXPERTS, ModelConfig
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed
from weights_io.files.tensor import LazyTensor
from weights_io.parameters import EXPERTS, MLP, ROUTER, Parameter, parameters, short_name
from weights_io.write import Tensor

ROUTER_STD = 0.1  # variance 0.01, arXiv 2404.06395
COPIES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class Options:
    save_path: Annotated[Path, Former("out")]
    """Folder to write. It must be empty or not exist yet."""
    model: str | None = None
    """Dense model: folder, GGUF file, hub id (owner/name) or short name (default: the built-in model)."""
    num_experts: Annotated[int, Former("experts")] = 8
    """Number of experts: copies of each MLP."""
    num_experts_per_tok: Annotated[int, Former("top_k")] = 2
    """Experts selected for each token."""
    seed: int = 0
    """Seed of the router's random weights."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the written weights. By default each tensor keeps its own dtype."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where --model is downloaded from if it is not on this disk."""


def main(options: Options) -> None:
    """Convert a dense model to a mixture of experts with the same logits, to continue training."""
    from weights_io.command_line import command_above

    command_above("upcycle")(options)


def upcycled(
    checkpoint: Checkpoint, num_experts: int, num_experts_per_tok: int, seed: int = 0
) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Config and tensors of the mixture. Each tensor is read or generated when it is needed.

    Raises:
        InputError: the model has experts already or is a Llama, which has none; ``num_experts_per_tok`` is above
            ``num_experts``; a number is out of range.
    """
    dense = checkpoint.config
    if dense.num_experts:
        raise InputError(f"{checkpoint.path} has {dense.num_experts} experts already; give a dense model.")
    if dense.model_type == "llama":
        raise InputError(
            f"{checkpoint.path} is a Llama, which has no experts; convert it to a MiniCPM first with "
            "`python -m weights_io.convert --to hf --unfold`."
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise InputError(f"is {num_experts}; it must be at least 1 and at most {MAX_EXPERTS}.", option="num_experts")
    if not 1 <= num_experts_per_tok <= num_experts:
        raise InputError(
            f"is {num_experts_per_tok}; it must be at least 1 and at most the number of experts, {num_experts}.",
            option="num_experts_per_tok",
        )
    if seed < 0:
        raise InputError(f"is {seed}; it must not be negative.", option="seed")
    config = dataclasses.replace(dense, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
    sources = {expert.hf_name: _source(expert) for expert in EXPERTS}
    tensors: dict[str, LazyTensor | Computed] = {}
    for parameter in parameters(config):
        names = parameter.hf_names(config)
        if parameter is ROUTER:
            dtype = checkpoint.tensors[MLP[0].hf_name.format(layer=0)].dtype
            shape = parameter.tensor_shape(config)
            tensors |= {name: _router(shape, dtype, seed, layer) for layer, name in enumerate(names)}
        else:
            source = sources.get(parameter.hf_name)
            for place, name in zip(np.ndindex(*parameter.stack(config)), names, strict=True):
                tensors[name] = checkpoint.tensors[source.format(layer=place[0]) if source else name]
    return config, tensors


def _source(expert: Parameter) -> str:
    """``model.layers.{layer}.mlp.gate_proj.weight`` of ``model.layers.{layer}.mlp.experts.{expert}.w1.weight``."""
    return next(p.hf_name for p in MLP if short_name(p) == COPIES[short_name(expert)])


def _router(shape: tuple[int, ...], dtype: np.dtype, seed: int, layer: int) -> Computed:
    def make() -> np.ndarray:
        random = np.random.default_rng([seed, layer])  # per layer, so that the order of writing does not matter
        return (random.standard_normal(shape, np.float32) * np.float32(ROUTER_STD)).astype(dtype)

    return Computed(shape, dtype, make)


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m weights_io.upcycle")
