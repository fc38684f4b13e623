"""Multi-head latent attention (arXiv 2405.04434) as MiniCPM3 has it, with the caches of `mlx_lm`.

Dims: B batch, T new tokens, S cache slots, D hidden, N heads, C latent of keys and values, R rotary key, E = width of a
      key's part without RoPE, H value width.

The cache holds the latent and the one rotary key of a token, in place of each head's key and value: an `mlx_lm` cache
has the latents [B, 1, S, C] for keys and the rotary keys [B, 1, S, R] for values.

A few tokens attend in the absorbed form: the key half of ``kv_b_proj`` is applied to the query, and its value half to
the weighted sum of the latents, so that nothing is computed per cache slot and head. For more tokens the keys and
values of all heads are expanded from the latents.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from minicpm_mlx.layers.fused_linear import FusedLinear, runs_fused
from minicpm_mlx.layers.lora import effective_weight
from minicpm_mlx.layers.rope import Positions, apply_rope
from minicpm_mlx.layers.row_caches import by_row
from weights_io.config import ModelConfig

ABSORBED = 16  # most new tokens in the absorbed form, which builds their scores [B, N, T, S]
INNER_EPS = 1e-6  # of the norms of the latents, whatever rms_norm_eps is


class LatentAttention(nn.Module):
    """Projections to latents and from them, RoPE, attention (over the cache, if there is one), output projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.heads, self.rank, self.value_dim = heads, config.kv_lora_rank, config.head_dim
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.key_dim = self.nope_dim + self.rope_dim
        self.scale = self.key_dim**-0.5
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, INNER_EPS)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.key_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(self.rank, INNER_EPS)
        self.kv_b_proj = nn.Linear(self.rank, heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.value_dim, hidden, bias=False)
        self._fused: FusedLinear | None = None  # `fused_linear.fuse`

    def fusable(self) -> list[Any]:
        """The layers that `fused_linear` may compute as one."""
        return [self.q_a_proj, self.kv_a_proj_with_mqa]

    def __call__(self, x: mx.array, positions: Positions, cache: Any | None = None) -> mx.array:
        """[B, T, D] to [B, T, D]. ``cache``: this layer's cache, updated in place."""
        return self.o_proj(self.mixed(x, positions, cache))

    def mixed(self, x: mx.array, positions: Positions, cache: Any | None = None, last: bool = False) -> mx.array:
        """[B, T, D] to [B, T, NH]: the input of ``o_proj``. ``last``: only the last token's [B, 1, NH]."""
        if runs_fused(self, x):
            assert self._fused is not None
            low, joint = mx.split(self._fused(x), [len(self.q_a_proj.weight)], axis=-1)
        else:
            joint = self.kv_a_proj_with_mqa(x)
            low = self.q_a_proj(x[:, -1:] if last else x)
        latent, rope_key = mx.split(joint[:, None], [self.rank], axis=-1)  # [B, 1, T, C], [B, 1, T, R]
        latent, rope_key = self.kv_a_layernorm(latent), apply_rope(rope_key, positions)
        if last:
            positions = positions.last(x.shape[1])
        q = self.q_b_proj(self.q_a_layernorm(low))
        q = q.reshape(*q.shape[:2], self.heads, self.key_dim).transpose(0, 2, 1, 3)  # [B, N, T, E + R]
        nope, rope = mx.split(q, [self.nope_dim], axis=-1)
        rope = apply_rope(rope, positions)

        def attended(cache, nope, rope, latent, rope_key):
            if cache is not None:
                latent, rope_key = cache.update_and_fetch(latent, rope_key)
            if cache is not None and nope.shape[2] <= ABSORBED:
                return self.absorbed(nope, rope, latent, rope_key, positions.mask, cache)
            return self.expanded(nope, rope, _whole(latent, cache), _whole(rope_key, cache), positions.mask)

        out = by_row(attended, cache, nope, rope, latent, rope_key)
        return out.transpose(0, 2, 1, 3).reshape(*out.shape[:1], out.shape[2], -1)

    def expanded(self, nope: mx.array, rope: mx.array, latent: mx.array, rope_key: mx.array, mask: Any) -> mx.array:
        """Attention [B, N, T, H] with the keys and values of all heads. Metal's fused attention wants values as wide as
        keys."""
        both = self.kv_b_proj(latent[:, 0])
        both = both.reshape(*both.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)  # [B, N, S, E + H]
        key, value = mx.split(both, [self.nope_dim], axis=-1)
        key = mx.concatenate([key, mx.broadcast_to(rope_key, (*key.shape[:3], self.rope_dim))], axis=-1)
        q = mx.concatenate([nope, rope], axis=-1)
        if self.value_dim < self.key_dim:
            value = mx.pad(value, [(0, 0)] * 3 + [(0, self.key_dim - self.value_dim)])
        out = scaled_dot_product_attention(q, key, value, cache=None, scale=self.scale, mask=mask)
        return out[..., : self.value_dim]

    def absorbed(
        self, nope: mx.array, rope: mx.array, latent: Any, rope_key: Any, mask: mx.array | str | None, cache: Any
    ) -> mx.array:
        """`expanded` without keys and values: the latents are both. They are quantized triples for a quantized
        ``cache``."""
        batch, _, width, _ = nope.shape
        weight = effective_weight(self.kv_b_proj, nope.dtype).reshape(self.heads, -1, self.rank)
        for_keys, for_values = mx.split(weight, [self.nope_dim], axis=1)  # [N, E, C], [N, H, C]

        def rows(q: mx.array) -> mx.array:
            """[B, N, T, X] as [B, 1, NT, X]: the heads share their keys."""
            return q.reshape(batch, 1, self.heads * width, -1)

        scores = _product(rows(nope @ for_keys), latent, cache, True) + _product(rows(rope), rope_key, cache, True)
        scores = scores.reshape(batch, self.heads, width, -1) * self.scale
        if isinstance(mask, str):  # "causal": the new tokens are the last ones
            slots = scores.shape[-1]
            mask = mx.arange(slots) <= mx.arange(slots - width, slots)[:, None]
        if mask is not None:
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        weights = mx.softmax(scores, axis=-1, precise=True)
        out = _product(rows(weights), latent, cache, False).reshape(batch, self.heads, width, -1)
        return out @ for_values.swapaxes(-1, -2)


def _product(x: mx.array, stored: Any, cache: Any, transpose: bool) -> mx.array:
    """x [B, 1, M, X] times the stored [B, 1, S, X] transposed, or x [B, 1, M, S] times it."""
    if isinstance(stored, mx.array):
        return x @ (stored.swapaxes(-1, -2) if transpose else stored)
    packed, scales, biases = stored
    return mx.quantized_matmul(x, packed, scales, biases, transpose, cache.group_size, cache.bits)


def _whole(stored: Any, cache: Any) -> mx.array:
    """The stored numbers as an array."""
    if isinstance(stored, mx.array):
        return stored
    packed, scales, biases = stored
    return mx.dequantize(packed, scales, biases, cache.group_size, cache.bits)
