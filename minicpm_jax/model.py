"""MiniCPM's decoder: a pure function of (weights, token ids, cache), dressed as Flax NNX modules.

Dims: B batch, T new tokens, S cache slots, V vocabulary, D hidden, F intermediate, L layers,
      N query heads, K key/value heads, G = N / K, H head dimension.

The layers are stacked on axis 0 and scanned, so the program is as long as one layer. `unstack` gives the same model
with a list of layers: XLA:CPU reads separate arrays three times as fast as slices of a stacked one.
Source of the semantics: modeling_minicpm.py of the released checkpoints; the scales are muP's (arXiv 2404.06395).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, ArrayLike, Float, Int

from minicpm_data.token_ids import checked_ids
from minicpm_jax.adapters import LowRank
from minicpm_jax.arithmetic import divided, gated, product, product_on_cpu, rows, rows_on_cpu, scaled
from minicpm_jax.attention import Attention, Positions, positions_of, worked_out
from minicpm_jax.cache import Cache
from minicpm_jax.moe import ExpertLinear, MoE
from minicpm_jax.quantised_on_cpu import on_cpu
from minicpm_jax.sharding import (
    ADDED_UP,
    by_tokens,
    copies,
    gathered_rows,
    gathered_tokens,
    padded,
    scattered_tokens,
    shardings,
)
from weights_io.config import ModelConfig
from weights_io.parameters import parameters


class Linear(nnx.Module):
    """y = W x, without bias. The weight keeps the [out, in] order of the checkpoint."""

    def __init__(self, weight: Float[Array, "O I"]):
        self.weight = nnx.Param(weight)
        self.adapter: LowRank | None = nnx.data(None)
        self.product = product  # `unstack` has another
        self.turned: NamedSharding | None = None  # of the weight as [I, O]; `train` says

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        weight = self.weight[...]
        if self.turned is not None:
            weight = jax.lax.with_sharding_constraint(weight.T, self.turned).T
        y = self.product(weight, x)
        return y if self.adapter is None else self.adapter(x, y, self.product)


class Embedding(nnx.Module):
    """A table of rows; a tied head is its `attend`."""

    def __init__(self, weight: Float[Array, "V D"]):
        self.weight = nnx.Param(weight)
        self.product, self.rows = product, rows  # `unstack` has others

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.rows(self.weight, ids)

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return self.product(self.weight[...], x)


class RMSNorm(nnx.Module):
    """x / rms(x), rounded to the model's dtype, then times the weight (in this order, as the original)."""

    def __init__(self, weight: Float[Array, "D"], eps: float):
        self.weight, self.eps = nnx.Param(weight), eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed, weight = (wide * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype), self.weight[...]
        if weight.ndim == 1:
            return normed * weight
        rows, tokens, width = weight.shape  # each device with its copy: `_own_norms`
        parts = normed.reshape(rows, len(x) // rows, tokens, -1, width)
        return (parts * weight[:, None, :, None]).reshape(x.shape)


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, weights: dict[str, Any], config: ModelConfig):
        self.gate_proj = Linear(weights["gate_proj"]["weight"])
        self.up_proj = Linear(weights["up_proj"]["weight"])
        self.down_proj = Linear(weights["down_proj"]["weight"])
        self.threshold = config.activation_threshold

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        with jax.named_scope("mlp"):
            return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.threshold))


class DecoderLayer(nnx.Module):
    def __init__(self, weights: dict[str, Any], config: ModelConfig):
        self.input_layernorm = RMSNorm(weights["input_layernorm"]["weight"], config.rms_norm_eps)
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
        """Hidden state, cache, and the `moe.imbalance` of this layer (0 where it has no experts)."""
        mesh = self.self_attn.mesh if cache is None else None
        added, cache = self.self_attn(gathered_tokens(self.input_layernorm(x), mesh), positions, cache, layer)
        x = x + scaled(scattered_tokens(added, mesh), self.residual_scale)
        normed = gathered_tokens(self.post_attention_layernorm(x), mesh)
        if isinstance(self.mlp, MoE):
            added, imbalance = self.mlp(normed, positions.real)
        else:
            added, imbalance = self.mlp(normed), jnp.float32(0)
        return x + scaled(scattered_tokens(added, mesh), self.residual_scale), cache, imbalance


LAYERS: dict[str, type[DecoderLayer]] = {}  # by model_type, where a variant has another


class Decoder(nnx.Module):
    """Embedding, layers and final norm: all but the head."""

    def __init__(self, weights: dict[str, Any], config: ModelConfig):
        self.embed_tokens = Embedding(weights["embed_tokens"]["weight"])
        layer = LAYERS.get(config.model_type, DecoderLayer)
        self.layers = layer(weights["layers"], config)  # stacked: every leaf has a leading axis L
        self.norm = RMSNorm(weights["norm"]["weight"], config.rms_norm_eps)
        self.embedding_scale = config.embedding_scale
        self.mesh: Mesh | None = None  # of more than one device; `loading` says

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        with jax.named_scope("embed"):
            words = self.embed_tokens(ids).astype(self.norm.weight.dtype)  # the model's, whatever the table's
            return scaled(words, self.embedding_scale)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Positions, cache: Cache | None = None, remat: bool = False
    ) -> tuple[Float[Array, "B T D"], Cache | None, Float[Array, ""]]:
        """Run the layers over embeddings; returns the hidden state before the final norm, the cache, and the mean of
        the layers' `moe.imbalance`, which costs nothing where it is not used. ``remat``: recompute each layer in the
        backward pass instead of keeping what it computed."""

        def step(carry, layer):
            x, cache = carry
            weights, index = layer
            if cache is None:  # else few rows, whose sums travel more cheaply than the weights
                x = by_tokens(x, self.mesh)
            x, cache, imbalance = weights(x, positions, cache, index)
            return (x, cache), imbalance

        if cache is None:
            x = gathered_rows(x, self.mesh)  # the table of words is split along D
        if isinstance(self.layers, nnx.List):
            positions = worked_out(positions)
            carry, each = (x, cache), []
            for index, layer in enumerate(self.layers):
                carry, imbalance = step(carry, (layer, index))
                each.append(imbalance)
            return *carry, jnp.mean(jnp.stack(each))
        depth = self.layers.input_layernorm.weight.shape[0]
        layers = self.layers if cache is not None else _own_norms(self.layers, x, self.mesh)
        kept = jax.checkpoint_policies.save_only_these_names(ADDED_UP)  # 0.7 GB of 4.8 of MiniCPM-1B over fsdp, tensor
        step = jax.checkpoint(step, policy=kept) if remat else step
        (x, cache), each = jax.lax.scan(step, (x, cache), (layers, jnp.arange(depth)))
        return x, cache, jnp.mean(each)


def _own_norms(layers: DecoderLayer, x: Float[Array, "B T D"], mesh: Mesh | None) -> DecoderLayer:
    """The layers, stacked, with norms of which each device of the mesh has `copies`: their gradients are added up over
    the devices once, not in every layer."""

    def own(part: Any) -> Any:
        norm = mesh is not None and isinstance(part, RMSNorm)
        return RMSNorm(copies(part.weight[...], x, mesh), part.eps) if norm else part

    return jax.tree.map(own, layers, is_leaf=lambda part: isinstance(part, RMSNorm))


class Model(nnx.Module):
    """A causal language model. `model(input_ids)` gives logits; the parts serve generation and training."""

    def __init__(self, weights: dict[str, Any], config: ModelConfig, eos_token_ids: tuple[int, ...] = ()):
        """``weights``: nested by the dots of `weights_io.parameters` names; leaves are arrays or shapes.
        ``eos_token_ids``: what config.json and generation_config.json say ends a text."""
        self.config, self.eos_token_ids = config, eos_token_ids
        self.model = Decoder(weights["model"], config)
        self.lm_head = None if config.tie_word_embeddings else Linear(weights["lm_head"]["weight"])

    def __call__(
        self, input_ids: Int[ArrayLike, "B T"], attention_mask: Int[ArrayLike, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits in float32. ``attention_mask``: 1 for tokens, 0 for padding on either side (whose rows are noise).
        Raises `InputError` for ids that are no [B, T] array, or (where they come from the host) not of the vocabulary.
        """
        ids = jnp.asarray(checked_ids(input_ids, self.config.vocab_size, jax.Array))
        mask = None if attention_mask is None else jnp.asarray(attention_mask)
        return _logits(self, ids, mask)

    def hidden_states(self, ids: Int[Array, "B T"], positions: Positions, remat: bool = False):
        """[B, T, D] after the final norm: what the head reads."""
        x, _, _ = self.model(self.model.embed(ids), positions, remat=remat)
        return self.model.norm(x)

    def head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32 from the normed hidden state, which is divided by D / dim_model_base, tied or not."""
        with jax.named_scope("head"):
            x = divided(x, self.config.logit_divisor)
            logits = self.model.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)
            return logits[..., : self.config.vocab_size].astype(jnp.float32)  # a mesh may have filled up the words

    def decode(
        self,
        ids: Int[Array, "B T"],
        cache: Cache,
        new: Int[Array, "B"] | int,
        start: Int[Array, "B"] | None = None,
        length: Int[Array, "B #T"] | Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Run more tokens through the cache: the first ``new`` of each row, the rest being padding on the right.
        Returns [B, T, D] after the final norm, for `head`.

        ``start``: the position of the first one, where that is not the row's end (a row that is done with its prompt).
        ``length``: of the whole prompt, if this is a part of it: dynamic NTK takes the base of the whole; [B, T] where
        each token stands for an answer of its own length.
        """
        start = cache.lengths if start is None else start
        length = cache.lengths + new if length is None else length
        positions = positions_of(self.config, ids.shape, start=start, length=length)
        x, written, _ = self.model(self.model.embed(ids), positions, cache)
        assert written is not None  # as a cache went in
        return self.model.norm(x), dataclasses.replace(written, lengths=cache.lengths + new)


@jax.jit
def _logits(model: Model, ids, mask):
    return model.head(model.hidden_states(ids, positions_of(model.config, ids.shape, mask=mask)))


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def abstract(config: ModelConfig, dtype: str = "bfloat16", mesh: Mesh | None = None, packed: bool = False) -> Model:
    """The model with shapes for weights: for `jax.eval_shape`, compiling and memory estimates; allocates nothing. On a
    ``mesh`` they lie where `loading.load` would place them, those to be ``packed`` in few bits too."""
    shape = padded(config, mesh, packed)
    where = {} if mesh is None else shardings(shape, mesh)
    leaves = {
        p.name: jax.ShapeDtypeStruct(p.shape(shape), jnp.dtype(dtype), sharding=where.get(p.name))
        for p in parameters(config)
    }
    return Model(nested(leaves), config)


def initialise(config: ModelConfig, key: Array, dtype: str = "float32") -> Model:
    """A fresh model with muP's initialisation, from the parameter table."""
    table = parameters(config)
    leaves = {}
    for parameter, subkey in zip(table, jax.random.split(key, len(table)), strict=True):
        shape = parameter.shape(config)
        if parameter.init == "ones":
            leaves[parameter.name] = jnp.ones(shape, dtype)
        else:
            leaves[parameter.name] = parameter.init_std(config) * jax.random.normal(subkey, shape, dtype)
    return Model(nested(leaves), config)


def unstack(model: Model, give_up: bool = False) -> Model:
    """The same weights with one array for each layer: the faster form for decoding on a CPU, which reads such three
    times as fast. There they lie where the stacked ones do; only layers that do not begin at a multiple of 64 bytes are
    copied. ``give_up``: the model that was given loses its layers, one stacked array after the other. One that is
    unstacked already is given back."""
    if isinstance(model.model.layers, nnx.List):
        return model
    leaves, form = jax.tree.flatten(model.model.layers)
    depth = model.config.num_hidden_layers
    each: list[list[Array]] = [[] for _ in range(depth)]
    for leaf in leaves:
        stacked, device = np.asarray(leaf), next(iter(leaf.devices()))
        for layer, own in zip(each, stacked, strict=True):
            layer.append(jax.device_put(own, device))
        if give_up:
            leaf.delete()
    copy = jax.tree.map(lambda x: x, model)
    copy.model.layers = nnx.List([jax.tree.unflatten(form, layer) for layer in each])
    for _, node in list(nnx.iter_graph(copy)):
        if isinstance(node, Linear | Embedding | ExpertLinear):
            node.product = product_on_cpu
        if isinstance(node, Linear | Embedding):
            node.weight = on_cpu(node.weight)
        if isinstance(node, Embedding):
            node.rows = rows_on_cpu
    return copy
