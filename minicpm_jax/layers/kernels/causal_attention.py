"""Attention within rows of tokens, forward and backward: JAX's splash attention, a Pallas kernel for TPUs.

Dims as in attention.py: B batch, T tokens, N query heads, K key/value heads, H head dimension.

No [T, T] array is written to HBM. A LoRA step on MiniCPM-2B (8 rows of 2,048 tokens, layers rematerialized) moves
650 GB there; with XLA's own attention and RoPE it moves 4,100.

Source: `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minicpm_jax.parallel.chips import LANES

BLOCK = 512  # most query tokens, and most key tokens, of a grid step


@functools.partial(jax.jit, static_argnames="interpret")
def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T NH"]:
    """softmax(q k / sqrt(H)) v over the tokens of the same segment up to each token. Differentiable.

    Scores, softmax and sums are float32. ``q`` is divided by sqrt(H) before the product, which is exact if H is a
    power of 4. ``interpret``: run the kernel without a TPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, width, heads, head_dim = q.shape
    filled = -(-width // LANES) * LANES  # padded to whole registers
    block = math.gcd(filled, BLOCK)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    # Tokens last: a last axis of 64 would be padded to 128 lanes.
    layouts = dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.SEQ_MINOR)
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names}, **layouts)
    with jax.ensure_compile_time_eval():
        mask = masks.MultiHeadMask([masks.CausalMask((filled, filled)) for _ in range(heads)])
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)

    def rows(x):  # the padding follows all tokens, and no token attends to it
        return jnp.pad(x, [(0, 0), (0, filled - width), (0, 0), (0, 0)]).transpose(0, 2, 1, 3)

    def row(q, k, v, segments):
        return kernel(q, k, v, None if segments is None else splash.SegmentIds(segments, segments))

    if segments is not None:
        segments = jnp.pad(segments.astype(jnp.int32), [(0, 0), (0, filled - width)])
    mixed = jax.vmap(row)(rows(q * head_dim**-0.5), rows(k), rows(v), segments)
    return mixed.transpose(0, 2, 1, 3).reshape(batch, filled, -1)[:, :width]
