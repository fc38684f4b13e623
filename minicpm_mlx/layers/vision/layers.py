"""Attention without a mask and an affine product: the parts of a tower and of a resampler."""

import mlx.core as mx


def affine(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """W x + b: [..., I] to [..., O]."""
    y = x @ weight.T
    return y if bias is None else y + bias


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Softmax attention of all queries over all keys, scaled by H^-0.5; the softmax is in float32.

    ``q`` is [B or 1, T, N, H], ``k`` and ``v`` are [B, S, N, H]; returns [B, T, N H].
    """
    q = mx.broadcast_to(q, (len(k), *q.shape[1:]))
    rows, tokens, _, width = q.shape
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=width**-0.5)
    return mixed.swapaxes(1, 2).reshape(rows, tokens, -1)
