"""Causal self-attention with rotary positions and the key/value caches of `mlx_lm`.

Dims as in model.py: B batch, T new tokens, S cache slots, D hidden, N query heads, K key/value heads, G = N / K,
      H head dimension.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from minicpm_mlx.layers.fused_linear import FusedLinear, runs_fused
from minicpm_mlx.layers.rope import Positions, apply_rope
from minicpm_mlx.layers.row_caches import by_row
from weights_io.config import ModelConfig


class Attention(nn.Module):
    """Projections, RoPE, attention (over the cache, if there is one) and the output projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self._fused: FusedLinear | None = None  # `fused_linear.fuse`

    def fusable(self) -> list[Any]:
        """The layers that `fused_linear` may compute as one."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def __call__(self, x: mx.array, positions: Positions, cache: Any | None = None) -> mx.array:
        """[B, T, D] to [B, T, D]. ``cache``: this layer's cache, updated in place."""
        return self.o_proj(self.mixed(x, positions, cache))

    def mixed(self, x: mx.array, positions: Positions, cache: Any | None = None, last: bool = False) -> mx.array:
        """[B, T, D] to [B, T, NH]: the input of ``o_proj``. ``last``: only the last token's [B, 1, NH]."""

        def heads(y):
            return y.reshape(*y.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)

        if runs_fused(self, x):
            assert self._fused is not None
            every = heads(self._fused(x))  # [B, N + 2K, T, H]
            rotated = apply_rope(every[:, : -self.kv_heads], positions)
            q, k, v = rotated[:, : self.heads], rotated[:, self.heads :], every[:, -self.kv_heads :]
        else:
            k, v = apply_rope(heads(self.k_proj(x)), positions), heads(self.v_proj(x))
            if last:
                x, positions = x[:, -1:], positions.last(x.shape[1])
            q = apply_rope(heads(self.q_proj(x)), positions)

        def attended(cache, q, k, v):
            if cache is not None:
                k, v = cache.update_and_fetch(k, v)
            return attend(q, k, v, positions.mask, cache)

        return by_row(attended, cache, q, k, v)


def attend(q: mx.array, k: Any, v: Any, mask: mx.array | str | None, cache: Any | None = None) -> mx.array:
    """softmax(q k / sqrt(H)) v as [B, T, NH], with the softmax in float32, of q [B, N, T, H] and k, v [B, K, S, H]
    (quantized triples for a quantized ``cache``). Query head n reads key/value head n // G."""
    batch, heads, width, head_dim = q.shape
    out = scaled_dot_product_attention(q, k, v, cache=cache, scale=head_dim**-0.5, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(batch, width, heads * head_dim)
