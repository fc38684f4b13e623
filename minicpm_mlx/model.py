"""MiniCPM's decoder in MLX. The class also implements the model interface of `mlx_lm`: its caches, samplers, LoRA
layers and quantization work on it.

Dims: B batch, T new tokens, S cache slots, V vocabulary, D hidden, F intermediate, L layers,
      N query heads, K key/value heads, G = N / K, H head dimension.

Attributes have the names of the tensors in Hugging Face files, so parameters need no map. A layer's experts are
stacked.

Source: modeling_minicpm.py of the released checkpoints; the scales are muP's (arXiv 2404.06395).
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from minicpm_data.tokenizer.input_ids import checked_ids
from minicpm_mlx.layers.attention import Attention
from minicpm_mlx.layers.fused_linear import FusedLinear, added, runs_fused
from minicpm_mlx.layers.latent_attention import LatentAttention
from minicpm_mlx.layers.moe import MoE
from minicpm_mlx.layers.ops import divide, gated_act, scale
from minicpm_mlx.layers.rope import Positions, positions_of
from minicpm_mlx.layers.vision.resampler import Resampler
from minicpm_mlx.layers.vision.tower import Tower, grid_of
from weights_io.checkpoint import BUFFERS
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.parameters import CONSTANTS, HEAD, module_name, parameters


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.threshold = config.activation_threshold
        self._fused: FusedLinear | None = None  # `fused_linear.fuse`

    def fusable(self) -> list[Any]:
        """The layers that `fused_linear` may compute as one."""
        return [self.gate_proj, self.up_proj]

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.hidden(x))

    def hidden(self, x: mx.array) -> mx.array:
        """[B, T, D] to [B, T, F]: the input of ``down_proj``."""
        if runs_fused(self, x):
            assert self._fused is not None
            gate, up = mx.split(self._fused(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return gated_act(gate, up, self.threshold)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP; each residual branch is scaled by scale_depth / sqrt(L)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # nn.RMSNorm rounds x / rms(x) to the model's dtype before the weight, as the original does.
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config) if config.is_latent else Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.num_experts else MLP(config)
        self.residual_scale = config.residual_scale

    def __call__(
        self, x: mx.array, positions: Positions, cache: Any | None = None, last: bool = False
    ) -> tuple[mx.array, mx.array]:
        """Returns the hidden state [B, T, D] and this layer's `moe.load_balancing_loss` (0 without experts).

        ``cache``: this layer's cache, updated in place. ``last``: return only the last token's hidden state [B, 1,
        D].
        """
        normed, kept = self.input_layernorm(x), x[:, -1:] if last else x
        if type(self.self_attn) in (Attention, LatentAttention):  # a variant may override __call__
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


LAYERS: dict[str, type[DecoderLayer]] = {}  # model_type -> decoder layer of a variant


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything but the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layer = LAYERS.get(config.model_type, DecoderLayer)
        self.layers = [layer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embedding_scale, self.vocab_size = config.embedding_scale, config.vocab_size

    def embed(self, ids: mx.array, features: mx.array | None = None) -> mx.array:
        """[B, T] to [B, T, D]: scaled embeddings; where an id is beyond the vocabulary, the unscaled ``features``
        [B, T, D] at its place."""
        if features is None:
            return scale(self.embed_tokens(ids), self.embedding_scale)
        x = scale(self.embed_tokens(mx.minimum(ids, self.vocab_size - 1)), self.embedding_scale)
        return mx.where(ids[..., None] < self.vocab_size, x, features.astype(x.dtype))

    def __call__(
        self,
        x: mx.array,
        positions: Positions,
        cache: Sequence[Any] | None = None,
        remat: bool = False,
        last: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Run the layers over embeddings.

        Returns the hidden state before the final norm and the mean of the layers' `moe.load_balancing_loss` (free
        when unused). ``remat``: recompute each layer in the backward pass instead of storing its activations.
        ``last``: only the last token's hidden state.
        """
        each = []
        for index, layer in enumerate(self.layers):
            run = nn.utils.checkpoint(layer) if remat else layer
            own = None if cache is None else cache[index]
            x, aux_loss = run(x, positions, own, last and index == len(self.layers) - 1)
            each.append(aux_loss)
        return x, mx.stack(each).mean()


class Model(nn.Module):
    """A causal language model: `model(input_ids)` gives logits. Generation and training call its parts."""

    def __init__(self, config: ModelConfig, eos_token_ids: tuple[int, ...] = ()):
        """Build the modules; the weights are loaded afterwards.

        Arguments:
            config: the model's config.
            eos_token_ids: end-of-text ids from config.json and generation_config.json.
        """
        super().__init__()
        self.config, self.eos_token_ids = config, eos_token_ids
        self.adapters: tuple[str, ...] = ()  # of `layers.row_lora`
        self.model_type = config.model_type
        self.model = Decoder(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vpm = None if config.vision is None else Tower(config.vision)
        self.resampler = None if config.vision is None else Resampler(config.vision)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any | None = None,
        features: Any | None = None,
        cache: Sequence[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Logits of a batch of token ids.

        Arguments:
            input_ids: [B, T] token ids, an array or a list of lists.
            attention_mask: [B, T]; 1 for tokens, 0 for padding on either side. Logits at padding are meaningless.
            features: [B, T, D]; where an id is the vocabulary's size, a token of a image (`encode_images`) in place
                of an embedding.
            cache: one `mlx_lm` cache per layer, updated in place; the ids follow the cached tokens.
            input_embeddings: [B, T, D], used unscaled in place of the embeddings of the ids.

        Returns: [B, T, V] logits in float32.

        Raises: `InputError` if ``input_ids`` is not a [B, T] array or (for host arrays) holds an id outside the
        vocabulary.
        """
        if attention_mask is not None and cache is not None:
            raise InputError("attention_mask does not go with a cache; pad on the left and use a BatchKVCache.")
        ids = mx.array(checked_ids(input_ids, self.config.vocab_size + (features is not None), mx.array))
        mask = None if attention_mask is None else mx.array(attention_mask)
        positions = positions_of(self.config, ids, mask, None if cache is None else cache[0])
        features = None if features is None else mx.array(features)
        x = self.model.embed(ids, features) if input_embeddings is None else input_embeddings
        x, _ = self.model(x, positions, cache)
        return self.head(self.model.norm(x))

    def encode_images(self, pixels: Any) -> mx.array:
        """The tokens of images, or slices, of one size.

        Arguments:
            pixels: [B, 3, H, W], normalized (`minicpm_data.images.processing`).

        Returns: [B, S, D], S tokens of each, in float32.

        Raises: `InputError` if the model takes no images.
        """
        if self.vpm is None or self.resampler is None or self.config.vision is None:
            raise InputError(f"the model ({self.config.family.architecture}) takes no images; load one that sees.")
        x = mx.array(pixels).astype(self.model.norm.weight.dtype)
        return self.resampler(self.vpm(x), grid_of(x.shape, self.config.vision.patch_size)).astype(mx.float32)

    def hidden_states(self, ids: mx.array, positions: Positions, features: mx.array | None = None) -> mx.array:
        """[B, T, D] after the final norm: the input of `head`."""
        return self.hidden_states_and_aux_loss(ids, positions, features=features)[0]

    def hidden_states_and_aux_loss(
        self, ids: mx.array, positions: Positions, remat: bool = False, features: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """`hidden_states` and the mean of the layers' `moe.load_balancing_loss`, for training."""
        x, aux_loss = self.model(self.model.embed(ids, features), positions, remat=remat)
        return self.model.norm(x), aux_loss

    def head(self, x: mx.array) -> mx.array:
        """Logits in float32. The normed hidden state is divided by D / dim_model_base, whether the head is tied or
        not."""
        x = divide(x, self.config.logit_divisor)
        logits = self.model.embed_tokens.as_linear(x) if self.lm_head is None else self.lm_head(x)
        return logits.astype(mx.float32)

    def decode(
        self,
        ids: mx.array,
        cache: Sequence[Any],
        length: int | mx.array | None = None,
        last: bool = False,
        features: mx.array | None = None,
    ) -> mx.array:
        """Run more tokens through the cache.

        Arguments:
            ids: [B, T] tokens.
            cache: one `mlx_lm` cache per layer, updated in place.
            length: length of the whole prompt ([B] if rows differ), if these tokens are one chunk of it: dynamic NTK
                and LongRoPE scale RoPE for the whole prompt. [B, T] if each token needs the scaling of its own length.
            last: compute only the last token's output, which spares the last layer work.
            features: as in `Decoder.embed`.

        Returns: the hidden states [B, T, D] after the final norm, for `head` ([B, 1, D] with ``last``).
        """
        positions = positions_of(self.config, ids, cache=cache[0], length=length)
        x, _ = self.model(self.model.embed(ids, features), positions, cache, last=last)
        return self.model.norm(x)

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers: `mlx_lm` makes one cache for each."""
        return self.model.layers

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Drop tensors that are not parameters and stack the experts, for `mlx_lm.utils.load_model`. Our own `loading`
        does not use this; it also refuses a stored head that differs from the embedding it is tied to."""
        kept = {
            name: array
            for name, array in weights.items()
            if not (name.endswith(BUFFERS) or (self.config.tie_word_embeddings and name == HEAD.hf_name))
        }
        for parameter in parameters(self.config):
            for name, tensors in parameter.mlx_names(self.config).items() if parameter.per_expert else ():
                for part in ("weight", "scales", "biases"):
                    experts = [f"{module_name(tensor)}.{part}" for tensor in tensors]
                    if kept.keys() >= set(experts):  # otherwise saved by this class, already stacked
                        kept[f"{module_name(name)}.{part}"] = mx.stack([kept.pop(expert) for expert in experts])
        return kept


class ModelArgs(ModelConfig):
    """The config class under the name that `mlx_lm` looks up."""

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """`ModelConfig.from_dict` without the quantization, which `mlx_lm` applies to the built model itself."""
        theirs = ("quantization", "quantization_config", "quantize_activations")
        own = {key: value for key, value in raw.items() if key not in theirs}
        return ModelConfig.from_dict(own, source)


def abstract(config: ModelConfig, dtype: str = "bfloat16") -> Model:
    """The model with lazy zeros for weights, never computed unless used: for shapes and memory estimates."""
    model = Model(config)
    leaves = {
        n: mx.zeros(p.layer_shape(config), getattr(mx, dtype)) for p in parameters(config) for n in p.mlx_names(config)
    }
    model.load_weights(list(leaves.items()))
    return model


def initialize(config: ModelConfig, key: mx.array, dtype: str = "float32") -> Model:
    """A model with random weights: muP's initialization, from the parameter table. ``key``: from `mx.random.key`."""
    model, table = Model(config), parameters(config)
    leaves = {}
    for parameter, subkey in zip(table, mx.random.split(key, len(table)), strict=True):
        names, shape = parameter.mlx_names(config), parameter.layer_shape(config)
        for name, layer_key in zip(names, mx.random.split(subkey, len(names)), strict=True):
            if parameter.init in CONSTANTS:
                leaves[name] = mx.full(shape, CONSTANTS[parameter.init], getattr(mx, dtype))
            else:
                leaves[name] = parameter.init_std(config) * mx.random.normal(shape, getattr(mx, dtype), key=layer_key)
    model.load_weights(list(leaves.items()))
    return model
