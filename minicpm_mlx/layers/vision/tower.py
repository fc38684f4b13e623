"""The towers: SigLIP so400m of MiniCPM-V 1.0 and 2.0, and EVA02-E of OmniLMM-12B.

Dims: B images or slices of one size, T patches (and the class token), P pixels of a patch, W width, N heads.

Source: timm 0.9.10, vit_so400m_patch14_siglip_384 (pre-norm blocks) and eva02_enormous_patch14_clip_224 (post-norm
blocks, a class token, no bias of the keys). Both have GELU with erf, and learned positions, which are interpolated to
the grid of the image. timm's last block is not run, and its final norm is.
"""

import mlx.core as mx
import mlx.nn as nn

from minicpm_data.images.positions import antialiased
from minicpm_mlx.layers.vision.layers import affine, attention
from weights_io.vision.config import LAYER_NORM_EPS, VisionConfig


class Attention(nn.Module):
    """Self-attention; queries, keys and values are one product."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, of_eva = config.hidden_size, config.tower == "eva"
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=not of_eva), nn.Linear(width, width)
        if of_eva:
            self.q_bias, self.v_bias = mx.zeros(width), mx.zeros(width)

    def __call__(self, x: mx.array) -> mx.array:
        qkv = self.qkv(x)
        if "q_bias" in self:  # EVA's
            qkv = qkv + mx.concatenate([self.q_bias, mx.zeros_like(self.q_bias), self.v_bias])
        q, k, v = mx.moveaxis(qkv.reshape(*x.shape[:2], 3, self.heads, self.head_dim), 2, 0)
        return self.proj(attention(q, k, v))


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), with the exact GELU."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(nn.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP. SigLIP normalizes what goes into a branch, EVA what comes out of it."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, LAYER_NORM_EPS)
        self.attn, self.mlp = Attention(config), MLP(config)
        self.post_norm = config.tower == "eva"

    def __call__(self, x: mx.array) -> mx.array:
        if self.post_norm:
            x = x + self.norm1(self.attn(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchProjection(nn.Module):
    """The weight and bias of timm's convolution, [W, 3, P, P]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.weight = mx.zeros((config.hidden_size, 3, config.patch_size, config.patch_size))
        self.bias = mx.zeros(config.hidden_size)


class PatchEmbed(nn.Module):
    """A linear layer over the pixels of each patch. The weight has the shape of timm's convolution. As there, a patch
    at the edge that is not full is padded with zeros."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.proj = PatchProjection(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        """[B, 3, H, W] to [B, T, W]."""
        weight = self.proj.weight
        size, (rows, columns) = weight.shape[-1], grid_of(pixels.shape, weight.shape[-1])
        missing = rows * size - pixels.shape[-2], columns * size - pixels.shape[-1]
        pixels = mx.pad(pixels, [(0, 0), (0, 0), (0, missing[0]), (0, missing[1])])
        parts = pixels.reshape(len(pixels), 3, rows, size, columns, size)
        patches = parts.transpose(0, 2, 4, 1, 3, 5).reshape(len(pixels), rows * columns, -1)
        return affine(patches, weight.reshape(len(weight), -1), self.proj.bias)


class Tower(nn.Module):
    """From pixels to one vector for each patch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = mx.zeros((1, config.positions, config.hidden_size))
        if config.class_tokens:
            self.cls_token = mx.zeros((1, 1, config.hidden_size))
        self.blocks = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.LayerNorm(config.hidden_size, LAYER_NORM_EPS)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Run the tower.

        Arguments:
            pixels: [B, 3, H, W], normalized, in the dtype of the computation.

        Returns: [B, T, W], the patches, row by row, after the final norm, without the class token.
        """
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, self.config.class_tokens :]

    def embed(self, pixels: mx.array) -> mx.array:
        """Patches with their positions, and the class token with its own."""
        x = self.patch_embed(pixels)
        table = self.positions(grid_of(pixels.shape, self.config.patch_size))
        if self.config.class_tokens:
            first = mx.broadcast_to(self.cls_token, (len(x), 1, x.shape[-1])).astype(x.dtype)
            x = mx.concatenate([first, x], axis=1)
        return x + table.astype(x.dtype)

    def positions(self, grid: tuple[int, int]) -> mx.array:
        """The table of positions [1, T, W] for a ``grid`` of (rows, columns)."""
        table, own = self.pos_embed, self.config.position_grid
        if grid == (own, own):
            return table
        first, rest = table[:, : self.config.class_tokens], table[:, self.config.class_tokens :]
        rows, columns = (mx.array(antialiased(own, size)) for size in grid)
        square = rest.astype(mx.float32).reshape(own, own, -1)
        resized = mx.einsum("ri,ijw,cj->rcw", rows, square, columns)
        return mx.concatenate([first, resized.reshape(1, -1, table.shape[-1]).astype(table.dtype)], axis=1)


def grid_of(shape: tuple[int, ...], patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches of pixels of this ``shape``."""
    return -(-shape[-2] // patch_size), -(-shape[-1] // patch_size)
