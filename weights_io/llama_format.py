"""Convert MiniCPM to the Llama format and back, by folding the scales of MiniCPM's forward pass into the weights.

A Llama computes the same logits after these changes:

- the embedding is multiplied by ``scale_emb``;
- o_proj and down_proj are multiplied by ``scale_depth / sqrt(layers)``;
- the head is divided by ``hidden_size / dim_model_base``.

Head and embedding then differ and cannot be tied. A tensor is scaled when it is read, in float32 or wider, and rounded.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from weights_io.casting import Rounding, cast, numpy_dtype
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed
from weights_io.files.tensor import LazyTensor, located
from weights_io.parameters import EMBEDDING, HEAD, Parameter, head_parameter, parameters
from weights_io.rope_config import LongRoPE

ROWS = 4096  # rows read at a time to compare head and embedding


def refusal(config: ModelConfig) -> str | None:
    """The reason why a model cannot be written as a Llama; None if it can."""
    if config.model_type == "llama":
        return "the model is in the Llama format already; there is nothing to fold."
    if config.model_type != "minicpm":  # other families may have parameters or scales that are not folded here
        return f"a Llama does not have all parameters of {config.family.architecture}; use --to hf."
    if config.num_experts:
        return "a Llama has no experts, so that an MoE cannot be written as one; use --to hf."
    if config.hidden_act == "fatrelu":
        return "a Llama has no FATReLU, and another activation would change the logits; use --to hf."
    scaling = config.rope_scaling
    if isinstance(scaling, LongRoPE) and config.max_position_embeddings != scaling.original_max_position_embeddings:
        return (
            "a Llama takes longrope's factors by the length alone, and this model by max_position_embeddings too, "
            "which is not original_max_position_embeddings; use --to hf."
        )
    return None


def to_llama(
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor | Computed],
    dtype: str | None = None,
    rounding: Rounding | None = None,
) -> tuple[ModelConfig, dict[str, LazyTensor | Computed]]:
    """The Llama with the same logits, up to rounding.

    Arguments:
        config: of a MiniCPM.
        tensors: Hugging Face name -> tensor.
        dtype: of the folded tensors; None keeps each tensor's own.
        rounding: collects the rounding errors as the tensors are read.

    Returns:
        Config and tensors of the Llama. ``hidden_act`` is kept.

    Raises:
        InputError: the model is a Llama already, or has experts or FATReLU.
    """
    if (reason := refusal(config)) is not None:
        raise InputError(reason)
    llama = dataclasses.replace(
        config, model_type="llama", tie_word_embeddings=False, scale_emb=1.0, scale_depth=1.0, dim_model_base=1
    )
    folded: dict[str, LazyTensor | Computed] = {}
    for parameter in parameters(llama):
        multiply, divide = _scale(parameter, config)
        for name in parameter.hf_names(llama):
            stored = EMBEDDING.hf_name if parameter == HEAD and config.tie_word_embeddings else name
            folded[name] = _scaled(name, tensors[stored], multiply, divide, dtype, rounding)
    return llama, folded


def from_llama(
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    scale_emb: float = 12.0,
    scale_depth: float = 1.4,
    dim_model_base: int = 256,
    dtype: str | None = None,
    rounding: Rounding | None = None,
) -> tuple[ModelConfig, dict[str, LazyTensor | Computed]]:
    """The MiniCPM with the same logits; the inverse of `to_llama`.

    The logits are the same with any scales. Head and embedding are tied if they become equal up to rounding, for which
    both are read once.

    Arguments:
        config: of a Llama.
        tensors: Hugging Face name -> tensor.
        scale_emb, scale_depth, dim_model_base: the scales, which a Llama's config does not hold; the defaults are those
            of all released MiniCPMs.
        dtype, rounding: as in `to_llama`.

    Returns:
        Config and tensors of the MiniCPM.

    Raises:
        InputError: the model is not a Llama, a scale is not positive, or the heads do not fill the hidden size.
    """
    if config.model_type != "llama":
        raise InputError("the model is not in the Llama format; there is nothing to unfold.")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise InputError(
            f"hidden_size {config.hidden_size} is not num_attention_heads {config.num_attention_heads} x head_dim "
            f"{config.head_dim}, as a MiniCPM needs it; leave this model a Llama."
        )
    scales = {"scale_emb": scale_emb, "scale_depth": scale_depth, "dim_model_base": dim_model_base}
    raw = dataclasses.replace(config, model_type="minicpm", tie_word_embeddings=False).to_dict()
    minicpm = ModelConfig.from_dict(raw | scales, "the unfolded model")
    head = tensors[head_parameter(config).hf_name]
    if _tied(tensors[EMBEDDING.hf_name], head, minicpm):
        minicpm = dataclasses.replace(minicpm, tie_word_embeddings=True)
    unfolded: dict[str, LazyTensor | Computed] = {}
    for parameter in parameters(minicpm):
        multiply, divide = _scale(parameter, minicpm)
        for name in parameter.hf_names(minicpm):
            tensor = head if parameter == HEAD else tensors[name]
            unfolded[name] = _scaled(name, tensor, divide, multiply, dtype, rounding)
    return minicpm, unfolded


def _scale(parameter: Parameter, config: ModelConfig) -> tuple[float, float]:
    """The factor and the divisor that fold the scales into a parameter's tensors."""
    if parameter == EMBEDDING:
        return config.embedding_scale, 1.0
    if parameter == HEAD:
        return 1.0, config.logit_divisor
    return (config.residual_scale if parameter.adds_to_residual else 1.0), 1.0


def _scaled(
    name: str,
    tensor: LazyTensor | Computed,
    multiply: float,
    divide: float,
    dtype: str | None,
    rounding: Rounding | None,
) -> LazyTensor | Computed:
    if multiply == 1 and divide == 1:
        return tensor
    target = numpy_dtype(dtype or tensor.dtype)

    def make() -> np.ndarray:
        return cast(located(name, tensor), tensor.read(), target, multiply, divide, rounding)

    return Computed(tuple(tensor.shape), target, make)


def _tied(embedding: LazyTensor, head: LazyTensor, config: ModelConfig) -> bool:
    """Whether head and embedding are equal after unfolding, allowing for two roundings of each."""
    import ml_dtypes

    kinds = [ml_dtypes.finfo(dtype) for dtype in (embedding.dtype, head.dtype, np.float32)]  # compared in float32
    epsilon = max(float(kind.eps) for kind in kinds)
    tiny = max(float(kind.tiny) for kind in kinds)  # below it the rounding error is no longer relative
    scale, divisor = config.embedding_scale, config.logit_divisor
    tolerance = 2 * epsilon * tiny * max(divisor, 1 / scale)
    for start in range(0, config.vocab_size, ROWS):
        rows = (slice(start, start + ROWS),)
        x = embedding.read(rows).astype(np.float32) / np.float32(scale)
        y = head.read(rows).astype(np.float32) * np.float32(divisor)
        if not np.all(np.abs(x - y) <= 2 * epsilon * np.maximum(np.abs(x), np.abs(y)) + tolerance):
            return False
    return True
