"""The towers: SigLIP so400m of MiniCPM-V 1.0 and 2.0, and EVA02-E of OmniLMM-12B.

Dims: B images or slices of one size, T patches (and the class token), P pixels of a patch, W width, N heads.

Source: timm 0.9.10, vit_so400m_patch14_siglip_384 (pre-norm blocks) and eva02_enormous_patch14_clip_224 (post-norm
blocks, a class token, no bias of the keys). Both have GELU with erf, and learned positions, which are interpolated to
the grid of the image. timm's last block is not run, and its final norm is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from minicpm_data.images.positions import antialiased
from minicpm_jax.layers.kernels.precision import precision
from minicpm_jax.layers.vision.layers import BiasedLinear, LayerNorm, affine, attention
from weights_io.vision.config import VisionConfig


class Attention(nnx.Module):
    """Self-attention; queries, keys and values are one product."""

    def __init__(self, weights: dict[str, Any], config: VisionConfig):
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.qkv, self.proj = BiasedLinear(weights["qkv"]), BiasedLinear(weights["proj"])
        self.q_bias = nnx.Param(weights["q_bias"]) if "q_bias" in weights else nnx.data(None)
        self.v_bias = nnx.Param(weights["v_bias"]) if "v_bias" in weights else nnx.data(None)

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        if self.q_bias is None:
            qkv = self.qkv(x)
        else:  # EVA's
            q_bias, v_bias = self.q_bias[...], self.v_bias[...]
            qkv = affine(x, self.qkv.weight[...], jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]))
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, self.heads, self.head_dim), 2, 0)
        return self.proj(attention(q, k, v))


class MLP(nnx.Module):
    """fc2(gelu(fc1(x))), with the exact GELU."""

    def __init__(self, weights: dict[str, Any]):
        self.fc1, self.fc2 = BiasedLinear(weights["fc1"]), BiasedLinear(weights["fc2"])

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """Attention and MLP. SigLIP normalizes what goes into a branch, EVA what comes out of it."""

    def __init__(self, weights: dict[str, Any], config: VisionConfig):
        self.norm1, self.norm2 = LayerNorm(weights["norm1"]), LayerNorm(weights["norm2"])
        self.attn, self.mlp = Attention(weights["attn"], config), MLP(weights["mlp"])
        self.post_norm = config.tower == "eva"

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        if self.post_norm:
            x = x + self.norm1(self.attn(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nnx.Module):
    """A linear layer over the pixels of each patch. The weight has the shape of timm's convolution. As there, a patch
    at the edge that is not full is padded with zeros."""

    def __init__(self, weights: dict[str, Any]):
        self.proj = BiasedLinear(weights["proj"])

    def __call__(self, pixels: Float[Array, "B 3 H V"]) -> Float[Array, "B T W"]:
        weight = self.proj.weight[...]
        size, (rows, columns) = weight.shape[-1], grid_of(pixels.shape, weight.shape[-1])
        missing = rows * size - pixels.shape[-2], columns * size - pixels.shape[-1]
        pixels = jnp.pad(pixels, ((0, 0), (0, 0), (0, missing[0]), (0, missing[1])))
        parts = pixels.reshape(len(pixels), 3, rows, size, columns, size)
        patches = jnp.transpose(parts, (0, 2, 4, 1, 3, 5)).reshape(len(pixels), rows * columns, -1)
        return affine(patches, weight.reshape(len(weight), -1), self.proj.bias[...])


class Tower(nnx.Module):
    """From pixels to one vector for each patch."""

    def __init__(self, weights: dict[str, Any], config: VisionConfig):
        self.config = config
        self.patch_embed, self.norm = PatchEmbed(weights["patch_embed"]), LayerNorm(weights["norm"])
        self.pos_embed = nnx.Param(weights["pos_embed"])
        self.cls_token = nnx.Param(weights["cls_token"]) if config.class_tokens else nnx.data(None)
        self.blocks = Block(weights["blocks"], config)  # stacked: every leaf has a leading axis

    def __call__(self, pixels: Float[Array, "B 3 H V"]) -> Float[Array, "B T W"]:
        """Run the tower.

        Arguments:
            pixels: normalized, in the dtype of the computation.

        Returns: the patches, row by row, after the final norm, without the class token.
        """
        with jax.named_scope("tower"):
            x = self.embed(pixels)
            x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)
            return self.norm(x)[:, self.config.class_tokens :]

    def embed(self, pixels: Float[Array, "B 3 H V"]) -> Float[Array, "B T W"]:
        """Patches with their positions, and the class token with its own."""
        x = self.patch_embed(pixels)
        table = self.positions(grid_of(pixels.shape, self.config.patch_size))
        if self.cls_token is not None:
            first = jnp.broadcast_to(self.cls_token[...], (len(x), 1, x.shape[-1])).astype(x.dtype)
            x = jnp.concatenate([first, x], axis=1)
        return x + table.astype(x.dtype)

    def positions(self, grid: tuple[int, int]) -> Float[Array, "1 T W"]:
        """The table of positions for a ``grid`` of (rows, columns)."""
        table, own = self.pos_embed[...], self.config.position_grid
        if grid == (own, own):
            return table
        first, rest = table[:, : self.config.class_tokens], table[:, self.config.class_tokens :]
        rows, columns = (jnp.asarray(antialiased(own, size)) for size in grid)
        square = rest.astype(jnp.float32).reshape(own, own, -1)
        resized = jnp.einsum("ri,ijw,cj->rcw", rows, square, columns, precision=precision(square))
        return jnp.concatenate([first, resized.reshape(1, -1, table.shape[-1]).astype(table.dtype)], axis=1)


def grid_of(shape: tuple[int, ...], patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches of pixels of this ``shape``."""
    return -(-shape[-2] // patch_size), -(-shape[-1] // patch_size)
