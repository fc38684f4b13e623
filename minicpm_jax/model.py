"""MiniCPM's decoder: a pure function of (weights, token ids, cache), written as Flax NNX modules.

Dims: B batch, T new tokens, S cache slots, V vocabulary, D hidden, F intermediate, L layers,
      N query heads, K key/value heads, G = N / K, H head dimension.

The layers are stacked on axis 0 and scanned (`layers.stack`). A weight is an array, or a `layers.ops.Weight` with
its own product. The mesh is ambient: without one, `parallel.activations` does nothing.

Source: modeling_minicpm.py of the released checkpoints; the scales are muP's (arXiv 2404.06395).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, Int

from minicpm_data.tokenizer.input_ids import checked_ids
from minicpm_jax.layers.attention import Attention
from minicpm_jax.layers.kv_cache import Cache
from minicpm_jax.layers.latent_attention import LatentAttention
from minicpm_jax.layers.linear import Embedding, Linear, RMSNorm
from minicpm_jax.layers.moe import MoE
from minicpm_jax.layers.ops import divide, gated_act, scale
from minicpm_jax.layers.rope import Positions, positions_of
from minicpm_jax.layers.stack import run_layers
from minicpm_jax.layers.vision.resampler import Resampler
from minicpm_jax.layers.vision.tower import Tower, grid_of
from minicpm_jax.parallel.activations import all_gather_sequence, reduce_scatter_sequence
from minicpm_jax.parallel.mesh import with_model_mesh
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.parameters import CONSTANTS, parameters


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, weights: dict[str, Any], config: ModelConfig):
        self.gate_proj = Linear(weights["gate_proj"]["weight"])
        self.up_proj = Linear(weights["up_proj"]["weight"])
        self.down_proj = Linear(weights["down_proj"]["weight"])
        self.threshold = config.activation_threshold

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        with jax.named_scope("mlp"):
            return self.down_proj(gated_act(self.gate_proj(x), self.up_proj(x), self.threshold))


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP; each residual branch is scaled by scale_depth / sqrt(L)."""

    def __init__(self, weights: dict[str, Any], config: ModelConfig):
        self.input_layernorm = RMSNorm(weights["input_layernorm"]["weight"], config.rms_norm_eps)
        if config.is_latent:
            self.self_attn: Attention | LatentAttention = LatentAttention(weights["self_attn"], config)
        else:
            projections = {name: Linear(part["weight"]) for name, part in weights["self_attn"].items()}
            self.self_attn = Attention(projections, config)
        self.post_attention_layernorm = RMSNorm(weights["post_attention_layernorm"]["weight"], config.rms_norm_eps)
        if config.num_experts:
            router = Linear(weights["mlp"]["gate"]["weight"])
            self.mlp: MLP | MoE = MoE(router, weights["mlp"]["experts"], config)
        else:
            self.mlp = MLP(weights["mlp"], config)
        self.residual_scale = config.residual_scale

    def __call__(
        self, x: Float[Array, "B T D"], positions: Positions, cache: Cache | None = None, layer: ArrayLike = 0
    ) -> tuple[Float[Array, "B T D"], Cache | None, Float[Array, ""]]:
        """Returns the hidden state, the cache and this layer's `moe.load_balancing_loss` (0 without experts)."""
        normed = all_gather_sequence(self.input_layernorm(x), cache)
        added, cache = self.self_attn(normed, positions, cache, layer)
        x = x + scale(reduce_scatter_sequence(added, cache), self.residual_scale)
        normed = all_gather_sequence(self.post_attention_layernorm(x), cache)
        if isinstance(self.mlp, MoE):
            added, aux_loss = self.mlp(normed, positions.real)
        else:
            added, aux_loss = self.mlp(normed), jnp.float32(0)
        return x + scale(reduce_scatter_sequence(added, cache), self.residual_scale), cache, aux_loss


LAYERS: dict[str, type[DecoderLayer]] = {}  # model_type -> decoder layer of a variant


class Decoder(nnx.Module):
    """Embedding, layers and final norm: everything but the head."""

    def __init__(self, weights: dict[str, Any], config: ModelConfig):
        self.embed_tokens = Embedding(weights["embed_tokens"]["weight"])
        layer = LAYERS.get(config.model_type, DecoderLayer)
        self.layers = layer(weights["layers"], config)  # stacked: every leaf has a leading axis L
        self.norm = RMSNorm(weights["norm"]["weight"], config.rms_norm_eps)
        self.embedding_scale, self.vocab_size = config.embedding_scale, config.vocab_size

    def embed(self, ids: Int[Array, "B T"], features: Float[Array, "B T D"] | None = None) -> Float[Array, "B T D"]:
        """Scaled embeddings; where an id is beyond the vocabulary, the unscaled ``features`` at its place."""
        with jax.named_scope("embed"):
            known = ids if features is None else jnp.minimum(ids, self.vocab_size - 1)
            x = self.embed_tokens(known).astype(self.norm.weight.dtype)  # an int8 table may have another dtype
            x = scale(x, self.embedding_scale)
            return x if features is None else jnp.where(ids[..., None] < self.vocab_size, x, features.astype(x.dtype))

    def __call__(
        self, x: Float[Array, "B T D"], positions: Positions, cache: Cache | None = None, remat: bool = False
    ) -> tuple[Float[Array, "B T D"], Cache | None, Float[Array, ""]]:
        """Run the layers over embeddings.

        Returns the hidden state before the final norm, the cache, and the mean of the layers'
        `moe.load_balancing_loss` (free when unused). ``remat``: recompute each layer in the backward pass instead of
        storing its activations.
        """
        return run_layers(self.layers, x, positions, cache, remat)


class Model(nnx.Module):
    """A causal language model: `model(input_ids)` gives logits. Generation and training call its parts."""

    def __init__(
        self,
        weights: dict[str, Any],
        config: ModelConfig,
        eos_token_ids: tuple[int, ...] = (),
        mesh: Mesh | None = None,
    ):
        """Build the modules around given weights.

        Arguments:
            weights: tree nested by the dots of the names in `weights_io.parameters`; leaves are arrays or shapes.
            config: the model's config.
            eos_token_ids: end-of-text ids from config.json and generation_config.json.
            mesh: the `automatic` mesh that holds the weights; the model's programs run over it.
        """
        self.config, self.eos_token_ids, self.mesh = config, eos_token_ids, mesh
        self.adapters: tuple[str, ...] = ()  # of `layers.row_lora`
        self.model = Decoder(weights["model"], config)
        self.lm_head = None if config.tie_word_embeddings else Linear(weights["lm_head"]["weight"])
        vision = config.vision
        self.vpm = nnx.data(None) if vision is None else Tower(weights["vpm"], vision)
        self.resampler = nnx.data(None) if vision is None else Resampler(weights["resampler"], vision)

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        attention_mask: Int[ArrayLike, "B T"] | None = None,
        features: Float[ArrayLike, "B T D"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of a batch of token ids.

        Arguments:
            input_ids: [B, T] token ids.
            attention_mask: [B, T]; 1 for tokens, 0 for padding on either side. Logits at padding are meaningless.
            features: [B, T, D]; where an id is the vocabulary's size, a token of a image (`encode_images`) in place
                of an embedding.

        Returns: [B, T, V] logits in float32.

        Raises: `InputError` if ``input_ids`` is not a [B, T] array or (for host arrays) holds an id outside the
        vocabulary.
        """
        known = self.config.vocab_size + (features is not None)
        ids = jnp.asarray(checked_ids(input_ids, known, jax.Array))
        mask = None if attention_mask is None else jnp.asarray(attention_mask)
        return _logits(self, ids, mask, None if features is None else jnp.asarray(features))

    @with_model_mesh
    def encode_images(self, pixels: Float[ArrayLike, "B 3 H W"]) -> Float[Array, "B S D"]:
        """The tokens of images, or slices, of one size.

        Arguments:
            pixels: normalized (`minicpm_data.images.processing`).

        Returns: S tokens of each, in float32.

        Raises: `InputError` if the model takes no images.
        """
        if self.vpm is None:
            raise InputError(f"the model ({self.config.family.architecture}) takes no images; load one that sees.")
        return _encoded(self, jnp.asarray(pixels, self.model.norm.weight.dtype))

    def hidden_states(self, ids: Int[Array, "B T"], positions: Positions, features: Array | None = None):
        """[B, T, D] after the final norm: the input of `head`."""
        return self.hidden_states_and_aux_loss(ids, positions, features=features)[0]

    @with_model_mesh
    def hidden_states_and_aux_loss(
        self, ids: Int[Array, "B T"], positions: Positions, remat: bool = False, features: Array | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """`hidden_states` and the mean of the layers' `moe.load_balancing_loss`, for training."""
        x, _, aux_loss = self.model(self.model.embed(ids, features), positions, remat=remat)
        return self.model.norm(x), aux_loss

    @with_model_mesh
    def head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32. The normed hidden state is divided by D / dim_model_base, whether the head is tied or
        not."""
        with jax.named_scope("head"):
            x = divide(x, self.config.logit_divisor)
            logits = self.model.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)
            return logits[..., : self.config.vocab_size].astype(jnp.float32)  # a mesh may have padded the vocabulary

    @with_model_mesh
    def decode(
        self,
        ids: Int[Array, "B T"],
        cache: Cache,
        new: Int[Array, "B"] | int,
        start: Int[Array, "B"] | None = None,
        length: Int[Array, "B #T"] | Int[Array, "B"] | None = None,
        features: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Run more tokens through the cache.

        Arguments:
            ids: [B, T]; in each row the first ``new`` are tokens, the rest is padding on the right.
            cache: keys and values so far.
            new: number of tokens per row.
            start: [B] position of the first token, if it is not the row's current length (a row whose prompt has
                ended).
            length: [B] length of the whole prompt, if these tokens are one chunk of it: dynamic NTK and LongRoPE scale
                RoPE for the whole prompt. [B, T] if each token needs the scaling of its own length.
            features: as in `Decoder.embed`.

        Returns: the hidden states [B, T, D] after the final norm, for `head`, and the updated cache.
        """
        start = cache.lengths if start is None else start
        length = cache.lengths + new if length is None else length
        positions = positions_of(self.config, ids.shape, start=start, length=length)
        x, written, _ = self.model(self.model.embed(ids, features), positions, cache)
        assert written is not None  # as a cache went in
        return self.model.norm(x), dataclasses.replace(written, lengths=cache.lengths + new)


@jax.jit
def _logits(model: Model, ids, mask, features):
    return model.head(model.hidden_states(ids, positions_of(model.config, ids.shape, mask=mask), features))


@jax.jit
def _encoded(model: Model, pixels):
    grid = grid_of(pixels.shape, model.vpm.config.patch_size)
    return model.resampler(model.vpm(pixels), grid).astype(jnp.float32)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Nest a flat dictionary by the dots of its names: {"a.b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def abstract(config: ModelConfig, dtype: str = "bfloat16") -> Model:
    """The model with shapes for weights. It allocates nothing: for `jax.eval_shape`, compiling and memory estimates."""
    leaves = {p.name: jax.ShapeDtypeStruct(p.shape(config), jnp.dtype(dtype)) for p in parameters(config)}
    return Model(nested(leaves), config)


def initialize(config: ModelConfig, key: Array, dtype: str = "float32") -> Model:
    """A model with random weights: muP's initialization, from the parameter table."""
    table = parameters(config)
    leaves = {}
    for parameter, subkey in zip(table, jax.random.split(key, len(table)), strict=True):
        shape = parameter.shape(config)
        if parameter.init in CONSTANTS:
            leaves[parameter.name] = jnp.full(shape, CONSTANTS[parameter.init], dtype)
        else:
            leaves[parameter.name] = parameter.init_std(config) * jax.random.normal(subkey, shape, dtype)
    return Model(nested(leaves), config)


def get_layer(model: "Model", name: str) -> Any:
    """The layer whose weight the parameter table calls ``name``."""
    return functools.reduce(getattr, name.split(".")[:-1], model)
