"""Cross entropy of each token, computed in chunks so that the logits of a whole batch never exist at once."""

from typing import Any

import mlx.core as mx

from minicpm_data.datasets.examples import IGNORED
from minicpm_mlx.layers.lora import dense
from minicpm_mlx.layers.ops import divide
from minicpm_mlx.model import Model

LOGITS = 2**25  # most logits of a chunk: 134 MB in float32; MLX holds six to ten such arrays at once


def token_losses(model: Model, hidden: mx.array, labels: mx.array) -> mx.array:
    """Cross entropy of each label [B, T] in float32, at the label's own position, from hidden [B, T, D]; 0 where
    there is no label."""
    hidden = divide(hidden, model.config.logit_divisor)
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    chunk = max(1, LOGITS // (labels.shape[0] * model.config.vocab_size))
    trained_head = bool(head.trainable_parameters())
    ahead = model.training and not trained_head
    losses = _chunked(chunk, hidden[:, :-1], dense(head), labels[:, 1:], trained_head, ahead)
    return mx.pad(losses, [(0, 0), (1, 0)])


def _chunked(
    chunk: int, hidden: mx.array, weight: mx.array, targets: mx.array, trained_head: bool, ahead: bool
) -> mx.array:
    """Cross entropies [B, T] of hidden [B, T, D] and weight [V, D], C tokens of each row at a time. The gradient is
    custom: MLX would evaluate all chunks at once (measured: 83 MB where all logits take 67; 9 MB if each chunk
    depends on the one before), and accumulate the weight's gradient in the weight's dtype.

    ``ahead``: compute hidden's gradient (up to the incoming factor) while the logits exist. With a frozen head this
    takes two products instead of three; without a backward pass it is one too many.
    """
    parts = [slice(at, at + chunk) for at in range(0, targets.shape[1], chunk)]
    made: list[mx.array] = []  # gradients computed ahead

    @mx.custom_function
    def losses(hidden: mx.array, weight: mx.array) -> mx.array:
        found: list[mx.array] = []
        made.clear()
        for part in parts:
            before = found[-1:] + made[-1:]
            x = mx.depends(hidden[:, part], before) if before else hidden[:, part]
            logits, target, trained = _logits(x, targets[:, part], weight)
            right = mx.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
            found.append(mx.where(trained, mx.logsumexp(logits, axis=-1) - right, 0))
            if ahead:
                made.append(_share(logits, target, trained).astype(x.dtype) @ weight)
        return mx.concatenate(found, axis=1)

    @losses.vjp
    def backward(primals: Any, gradient: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        hidden, weight = primals
        if ahead:
            below = mx.concatenate(made, axis=1)
            return (below * gradient[..., None]).astype(below.dtype), mx.zeros_like(weight)
        total = mx.zeros(weight.shape)
        parts_below: list[mx.array] = []
        for part in parts:
            # A frozen head's gradient is unused, and so never computed unless something depends on it.
            before = parts_below[-1:] + [total] * trained_head
            x = mx.depends(hidden[:, part], before) if parts_below else hidden[:, part]
            share = _share(*_logits(x, targets[:, part], weight)) * gradient[:, part, None]
            share = share.astype(x.dtype)
            total = total + (share.flatten(0, 1).T @ x.flatten(0, 1)).astype(mx.float32)
            parts_below.append(share @ weight)
        return mx.concatenate(parts_below, axis=1), total.astype(weight.dtype)

    found: Any = losses(hidden, weight)
    return found


def _share(logits: mx.array, target: mx.array, trained: mx.array) -> mx.array:
    """The gradient of the cross entropies [B, C] with respect to the logits [B, C, V]."""
    right = target[..., None] == mx.arange(logits.shape[-1])
    return mx.where(trained[..., None], mx.softmax(logits, axis=-1) - right, 0)


def _logits(x: mx.array, targets: mx.array, weight: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Logits [B, C, V] in float32, targets with 0 in place of ignored ones, and which targets are not ignored."""
    return (x @ weight.T).astype(mx.float32), mx.maximum(targets, 0), targets != IGNORED
