"""MiniCPM's decoder in MLX. The class is also what `mlx_lm` asks of a model: its caches, samplers, LoRA layers and
quantisation work on it.

Dims: B batch, T new tokens, S cache slots, V vocabulary, D hidden, F intermediate, L layers,
      N query heads, K key/value heads, G = N / K, H head dimension.

Attributes are named as the tensors in Hugging Face files, so parameters need no map; a layer's experts are stacked.
Source of the semantics: modeling_minicpm.py of the released checkpoints; the scales are muP's (arXiv 2404.06395).
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from minicpm_data.tokenizer.input_ids import checked_ids
from minicpm_mlx.layers.attention import Attention
from minicpm_mlx.layers.fused_linear import Joined, added, joined
from minicpm_mlx.layers.moe import MoE
from minicpm_mlx.layers.ops import divide, gated_act, scale
from minicpm_mlx.layers.rope import Positions, positions_of
from weights_io.checkpoint import BUFFERS
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.parameters import HEAD, module_name, parameters


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.threshold = config.activation_threshold
        self._joined: Joined | None = None  # `fused_linear.join`

    def together(self) -> list[Any]:
        """The layers that `fused_linear` may compute as one."""
        return [self.gate_proj, self.up_proj]

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.hidden(x))

    def hidden(self, x: mx.array) -> mx.array:
        """[B, T, D] to [B, T, F], which ``down_proj`` reads."""
        if joined(self, x):
            assert self._joined is not None
            gate, up = mx.split(self._joined(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return gated_act(gate, up, self.threshold)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        # nn.RMSNorm rounds x / rms(x) to the model's dtype before the weight, as the original does.
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.num_experts else MLP(config)
        self.residual_scale = config.residual_scale

    def __call__(
        self, x: mx.array, positions: Positions, cache: Any | None = None, last: bool = False
    ) -> tuple[mx.array, mx.array]:
        """[B, T, D] to [B, T, D], and the `moe.aux_loss` of this layer (0 where it has no experts); ``cache``: this
        layer's, written in place. ``last``: only the last token's [B, 1, D]."""
        normed, kept = self.input_layernorm(x), x[:, -1:] if last else x
        if type(self.self_attn) is Attention:  # a variant's own may do more
            mixed = self.self_attn.mixed(normed, positions, cache, last)
            x = added(kept, self.self_attn.o_proj, mixed, self.residual_scale)
        else:
            more = self.self_attn(normed, positions, cache)
            x = kept + scale(more[:, -1:] if last else more, self.residual_scale)
        normed = self.post_attention_layernorm(x)
        aux_loss = mx.array(0.0)
        if type(self.mlp) is MLP:
            return added(x, self.mlp.down_proj, self.mlp.hidden(normed), self.residual_scale), aux_loss
        if isinstance(self.mlp, MoE):
            more, aux_loss = self.mlp(normed, positions.real)
        else:
            more = self.mlp(normed)
        return x + scale(more, self.residual_scale), aux_loss


LAYERS: dict[str, type[DecoderLayer]] = {}  # by model_type, where a variant has another


class Decoder(nn.Module):
    """Embedding, layers and final norm: all but the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layer = LAYERS.get(config.model_type, DecoderLayer)
        self.layers = [layer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embedding_scale = config.embedding_scale

    def embed(self, ids: mx.array) -> mx.array:
        """[B, T] to [B, T, D]."""
        return scale(self.embed_tokens(ids), self.embedding_scale)

    def __call__(
        self,
        x: mx.array,
        positions: Positions,
        cache: Sequence[Any] | None = None,
        remat: bool = False,
        last: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Run the layers over embeddings; returns the hidden state before the final norm, and the mean of the layers'
        `moe.aux_loss`, which costs nothing where it is not used. ``remat``: recompute each layer in the backward pass
        instead of keeping what it computed. ``last``: the state of the last token alone."""
        each = []
        for index, layer in enumerate(self.layers):
            run = nn.utils.checkpoint(layer) if remat else layer
            own = None if cache is None else cache[index]
            x, aux_loss = run(x, positions, own, last and index == len(self.layers) - 1)
            each.append(aux_loss)
        return x, mx.stack(each).mean()


class Model(nn.Module):
    """A causal language model. `model(input_ids)` gives logits; the parts serve generation and training."""

    def __init__(self, config: ModelConfig, eos_token_ids: tuple[int, ...] = ()):
        """``eos_token_ids``: what config.json and generation_config.json say ends a text."""
        super().__init__()
        self.config, self.eos_token_ids = config, eos_token_ids
        self.model_type = config.model_type
        self.model = Decoder(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any | None = None,
        cache: Sequence[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Logits [B, T, V] in float32 for ids [B, T] (arrays, or lists of lists).

        ``attention_mask`` [B, T]: 1 for tokens, 0 for padding on either side (whose rows are noise).
        ``cache``: one cache of `mlx_lm` for each layer, written in place; the ids then follow the cached tokens.
        ``input_embeddings`` [B, T, D]: used as they are instead of the ids' scaled embeddings.
        Raises `InputError` for ids that are no [B, T] array, or (where they come from the host) not of the vocabulary.
        """
        if attention_mask is not None and cache is not None:
            raise InputError("attention_mask does not go with a cache; pad on the left and use a BatchKVCache.")
        ids = mx.array(checked_ids(input_ids, self.config.vocab_size, mx.array))
        mask = None if attention_mask is None else mx.array(attention_mask)
        positions = positions_of(self.config, ids, mask, None if cache is None else cache[0])
        x = self.model.embed(ids) if input_embeddings is None else input_embeddings
        x, _ = self.model(x, positions, cache)
        return self.head(self.model.norm(x))

    def hidden_states(self, ids: mx.array, positions: Positions) -> mx.array:
        """[B, T, D] after the final norm: what the head reads."""
        return self.hidden_states_and_aux_loss(ids, positions)[0]

    def hidden_states_and_aux_loss(
        self, ids: mx.array, positions: Positions, remat: bool = False
    ) -> tuple[mx.array, mx.array]:
        """`hidden_states`, and the mean of the layers' `moe.load_balancing_loss`, for training."""
        x, aux_loss = self.model(self.model.embed(ids), positions, remat=remat)
        return self.model.norm(x), aux_loss

    def head(self, x: mx.array) -> mx.array:
        """Logits in float32 from the normed hidden state, which is divided by D / dim_model_base, tied or not."""
        x = divide(x, self.config.logit_divisor)
        logits = self.model.embed_tokens.as_linear(x) if self.lm_head is None else self.lm_head(x)
        return logits.astype(mx.float32)

    def decode(
        self, ids: mx.array, cache: Sequence[Any], length: int | mx.array | None = None, last: bool = False
    ) -> mx.array:
        """Run more tokens [B, T] through the cache. Returns [B, T, D] after the final norm, for `head`; ``last``: only
        the last token's, for which the last layer does no more than it must.

        ``length``: of the whole prompt ([B] where rows differ), if this is a part of it: dynamic NTK takes the base of
        the whole; [B, T] where each token stands for an answer of its own length.
        """
        positions = positions_of(self.config, ids, cache=cache[0], length=length)
        x, _ = self.model(self.model.embed(ids), positions, cache, last=last)
        return self.model.norm(x)

    @property
    def layers(self) -> list[DecoderLayer]:
        """For `mlx_lm`, which makes one cache for each."""
        return self.model.layers

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The files' tensors less those that are no parameters, experts stacked; for `mlx_lm.utils.load_model`.
        `loading` goes another way, and refuses a stored head that differs from the embedding it is tied to."""
        kept = {
            name: array
            for name, array in weights.items()
            if not (name.endswith(BUFFERS) or (self.config.tie_word_embeddings and name == HEAD.tensor))
        }
        for parameter in parameters(self.config):
            for name, tensors in parameter.layers(self.config).items() if parameter.of_expert else ():
                for part in ("weight", "scales", "biases"):
                    experts = [f"{module_name(tensor)}.{part}" for tensor in tensors]
                    if kept.keys() >= set(experts):  # else saved from here, and stacked already
                        kept[f"{module_name(name)}.{part}"] = mx.stack([kept.pop(expert) for expert in experts])
        return kept


class ModelArgs(ModelConfig):
    """The name under which `mlx_lm` looks for a model's config class."""

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """As `ModelConfig.from_dict`, but for the quantisation, which `mlx_lm` applies to the model it has made."""
        theirs = ("quantization", "quantization_config", "quantize_activations")
        own = {key: value for key, value in raw.items() if key not in theirs}
        return ModelConfig.from_dict(own, source)


def abstract(config: ModelConfig, dtype: str = "bfloat16") -> Model:
    """The model with weights that are never computed unless they are used: for shapes and memory estimates."""
    model = Model(config)
    leaves = {
        n: mx.zeros(p.layer_shape(config), getattr(mx, dtype)) for p in parameters(config) for n in p.layers(config)
    }
    model.load_weights(list(leaves.items()))
    return model


def initialize(config: ModelConfig, key: mx.array, dtype: str = "float32") -> Model:
    """A fresh model with muP's initialisation, from the parameter table. ``key``: from `mx.random.key`."""
    model, table = Model(config), parameters(config)
    leaves = {}
    for parameter, subkey in zip(table, mx.random.split(key, len(table)), strict=True):
        names, shape = parameter.layers(config), parameter.layer_shape(config)
        for name, layer_key in zip(names, mx.random.split(subkey, len(names)), strict=True):
            if parameter.init == "ones":
                leaves[name] = mx.ones(shape, getattr(mx, dtype))
            else:
                leaves[name] = parameter.init_std(config) * mx.random.normal(shape, getattr(mx, dtype), key=layer_key)
    model.load_weights(list(leaves.items()))
    return model
