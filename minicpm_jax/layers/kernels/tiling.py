"""How the attention kernels divide their work: groups of heads, pieces of the new tokens, blocks of the cache.

Dims as in cache_attention.py.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from minicpm_jax.parallel.chips import LANES

GRAIN = 8  # slots of a tile in HBM, the smallest fetch
PARTS = 6  # most sub-blocks of a block: each costs the scalar unit about 0.07 us per step on a v5e
FAR = 1 << 30  # beyond every slot
ROWS = 1024  # most queries of a step: with 512 slots their scores take 2 MiB
FEW = 128  # up to this many queries run as one group: the matrix unit multiplies them while it loads the next keys
BLOCK = 512  # most slots of a step
BLOCK_BYTES = 5 << 18  # 1.25 MiB, most of one block of keys: VMEM (16 MiB) holds four such blocks
# For decoding half of it: the first step fetches a whole block, and each step computes on one. That is 128 slots of the
# 2B, whose keys and values a v5e fetches in 1.4 us; by the length of the program the rest of a step takes 0.9 us.


@dataclass(frozen=True)
class Tiling:
    """The tiling of the work: everything that the grid and the index maps depend on except the fill of the rows."""

    batch: int
    width: int  # T
    slots: int  # S
    kv_heads: int  # K
    heads_per_kv: int  # G
    head_dim: int  # H
    lanes: int  # W
    piece: int  # t
    block: int  # slots of a block
    grain: int  # slots of its smallest sub-block; block / grain is a power of 2

    @staticmethod
    def of(batch: int, width: int, heads: int, head_dim: int, slots: int, kv_heads: int, itemsize: int) -> "Tiling":
        """The tiling for queries [batch, width, heads, head_dim] and a cache of ``slots`` with elements of
        ``itemsize`` bytes."""
        lanes, few = kv_heads * head_dim, heads * width <= FEW
        pair = math.lcm(LANES, head_dim)
        if not few and lanes % pair == 0:
            lanes = pair
        rows = lanes // head_dim * (heads // kv_heads)  # of one token
        piece = width
        if not few:
            most = 1 << max(4, (ROWS // rows).bit_length() - 1)
            piece = min(most, -(-width // 16) * 16)  # 16 rows of bfloat16 are a tile
        block, most_bytes = BLOCK, BLOCK_BYTES // 2 if few else BLOCK_BYTES
        while block > 128 and block * lanes * itemsize > most_bytes:
            block //= 2
        block = grain = min(block, slots)
        while few and grain % (2 * GRAIN) == 0 and grain << PARTS - 1 > block:
            grain //= 2
        return Tiling(batch, width, slots, kv_heads, heads // kv_heads, head_dim, lanes, piece, block, grain)

    @property
    def heads(self) -> int:
        """C: key/value heads of a group."""
        return self.lanes // self.head_dim

    @property
    def groups(self) -> int:
        return self.kv_heads // self.heads

    @property
    def pieces(self) -> int:
        return pl.cdiv(self.width, self.piece)

    @property
    def rows(self) -> int:
        return self.heads * self.heads_per_kv * self.piece

    @property
    def parts(self) -> tuple[int, ...]:
        """The sub-blocks of a block, n .. 0. Sub-block 0 is the grain that every block has; sub-block i > 0 is
        needed if the number of grains before it has binary digit i - 1."""
        return tuple(reversed(range((self.block // self.grain).bit_length())))

    def size(self, part: Any) -> Any:
        """Slots of a sub-block."""
        return self.grain << (part - (part > 0))

    def begin(self, part: Any) -> Any:
        """First slot of a sub-block in a full block."""
        return self.block - (self.grain << part)

    def seen(self, first: Any, piece: Any) -> Any:
        """Number of slots that the tokens of a piece attend to, in a row whose first new token has slot ``first``."""
        return least(first + least((piece + 1) * self.piece, self.width), self.slots)

    def blocks(self, first: Any, piece: Any) -> Any:
        """Number of blocks that hold them."""
        return divided(self.seen(first, piece) - 1, self.block) + 1

    def cut(self, part: Any, filled: Any) -> tuple[Any, Any]:
        """Offset of a sub-block within a block whose first ``filled`` slots (at least one) are filled, and whether
        it is needed."""
        grains = divided(filled - 1, self.grain)
        return (grains >> part << part) * self.grain, (2 * grains + 1) >> part & 1 == 1

    def begins(self, seen: Any, step: Any) -> list[tuple[Any, Any]]:
        """`cut` of each sub-block in the block of a step, of a row whose first ``seen`` slots are attended to."""
        return [self.cut(part, least(seen - step * self.block, self.block)) for part in self.parts]

    def places(self, shape: tuple[int, int], axis: int, step: Any, begins: list[tuple[Any, Any]]) -> Array:
        """The cache slots in the block of a step, along an axis. Slots of a sub-block that is not needed get a number
        beyond the cache."""
        place = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        moved = jnp.zeros(shape, jnp.int32)
        for begin, (offset, needed) in zip(map(self.begin, self.parts), begins, strict=True):
            moved = jnp.where(place >= begin, jnp.where(needed, offset - begin, FAR), moved)
        return step * self.block + place + moved

    def in_order(self, scale: Any, step: Any, begins: list[tuple[Any, Any]]) -> Array:
        """The scales [X, block] of a block, in the order of its slots: in a last block they are rolled to where its
        sub-blocks are."""
        place = jax.lax.broadcasted_iota(jnp.int32, (1, self.block), 1)
        whole = rolled = jnp.where(step * self.block + place < self.slots, scale[...], 0)
        for begin, (offset, _) in zip(map(self.begin, self.parts), begins, strict=True):
            if begin:
                rolled = jnp.where(place >= begin, pltpu.roll(whole, begin - offset, 1), rolled)
        return rolled

    def grid(self, first: Any) -> tuple[Any, ...]:
        """(B, groups, pieces, blocks of the fullest row) for rows whose first new tokens have the slots ``first``
        [B]."""
        return self.batch, self.groups, self.pieces, self.blocks(first, self.pieces - 1).max()

    def held(self, first: Int[Array, "B"]) -> Int[Array, "B*pieces*parts*2"]:
        """Row and block index that each sub-block holds from the last block of each row's piece on: of that block,
        of the one before it, or of an earlier row; the first slots if there is none. It is written so that XLA makes
        one fusion of it, because it runs in every layer."""
        count, parts = self.batch * self.pieces, len(self.parts)
        entry, other = jnp.arange(count * parts * 2), jnp.arange(count)[:, None]
        at, part = entry // (2 * parts), parts - 1 - entry // 2 % parts
        first = jnp.repeat(first, self.pieces)[:, None]
        seen = self.seen(first, other % self.pieces)
        last = divided(seen - 1, self.block)
        offset, needed = self.cut(part, seen - last * self.block)
        slot = last * self.block + jnp.where(needed, offset, self.begin(part) - self.block)
        place = other // self.pieces * self.slots + slot  # it grows from row to row
        place = jnp.max(jnp.where((other <= at) & (slot >= 0), place, 0), axis=0)
        return jnp.where(entry % 2 == 0, place // self.slots, place % self.slots // self.size(part))

    def stored(
        self, part: int, row: Any, group: Any, piece: Any, step: Any, layer: Any, first: Any, held: Any
    ) -> tuple[Any, ...]:
        """Index map of one sub-block of the keys, or of the values, [L, B, S, K H]."""
        size, parts = self.size(part), len(self.parts)
        end = 2 * parts * (row * self.pieces + piece + 1)  # of the piece's entries: the last is of part 0
        full = step < held[end - 1] >> parts - 1
        index = step * (self.block // size) + self.begin(part) // size
        entry = end - 2 * (part + 1)
        return layer[0], _chosen(full, row, held[entry]), _chosen(full, index, held[entry + 1]), group

    def scale(self, row: Any, group: Any, piece: Any, step: Any, layer: Any, first: Any, held: Any) -> tuple[Any, ...]:
        """Index map of the scales [L, B, X, S]: all heads at once, because they are few."""
        return layer[0], row, 0, least(step, self.blocks(first[row], piece) - 1)


def least(x: Any, y: Any) -> Any:
    return (jnp if isinstance(x, jax.Array) or isinstance(y, jax.Array) else np).minimum(x, y)


def _chosen(condition: Any, x: Any, y: Any) -> Any:
    return (jnp if isinstance(condition, jax.Array) else np).where(condition, x, y)


def divided(x: Any, by: int) -> Any:
    """x // by for x >= 0. JAX's ``//`` handles signs, for which Mosaic asks the default device for its type; that
    device is no TPU when compiling for one elsewhere."""
    return jax.lax.div(x, jnp.int32(by)) if isinstance(x, jax.Array) else x // by
