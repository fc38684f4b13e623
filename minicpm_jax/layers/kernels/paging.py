"""How the attention kernels walk over the pages of a cache: a list of the blocks of all rows, and index maps.

Dims as in paged_attention.py.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from minicpm_jax.layers.kernels.tiling import Tiling, divided, least

PAGES = 4  # most pages of a block: each is a fetch, and an index map, of its own


@dataclass(frozen=True)
class Paging:
    """How a `Tiling` of rows of W P slots goes through their pages."""

    tiling: Tiling
    page: int  # P
    pages: int  # n: of a block

    @staticmethod
    def of(tiling: Tiling, page: int) -> "Paging":
        return Paging(tiling, page, max(1, min(PAGES, tiling.block // page)))

    @property
    def width(self) -> int:
        """W."""
        return self.tiling.slots // self.page

    @property
    def block(self) -> int:
        """Slots of a block."""
        return self.pages * self.page

    @property
    def items(self) -> int:
        return self.tiling.batch * self.tiling.pieces

    def cost(self, cache: Any, flops: int, transcendentals: int, queries: int, groups: int = 1) -> pl.CostEstimate:
        """The cost for a pool that is full of the pages of these rows: it is declared before their fill is known.

        Arguments:
            cache: the pool.
            flops, transcendentals: of the rows of one piece, for one slot of the pool's arrays.
            queries: bytes of queries and output.
            groups: how often the pool is read.
        """
        stored = [x for x in (cache.k, cache.v, cache.k_scale, cache.v_scale) if x is not None]
        _, count, page, _ = cache.k.shape
        share = min(count - 1, self.tiling.batch * self.width) / count
        slots = int(share * count * page) * self.tiling.pieces
        held = sum(x.size * x.dtype.itemsize // x.shape[0] for x in stored)
        return pl.CostEstimate(
            flops=flops * slots,
            transcendentals=transcendentals * slots,
            bytes_accessed=int(held * share) * self.tiling.pieces * groups + queries,
        )

    def blocks(self, first: Any, piece: Any) -> Any:
        """Number of blocks that the tokens of a piece attend to."""
        return divided(self.tiling.seen(first, piece) - 1, self.block) + 1

    def item(self, step: Any, items: Any) -> tuple[Any, Any]:
        """Row and piece of a step."""
        pieces = self.tiling.pieces
        return (items[step], 0) if pieces == 1 else (divided(items[step], pieces), jax.lax.rem(items[step], pieces))

    def queries(self, group: Any, step: Any, layer: Any, first: Any, items: Any, *refs: Any) -> tuple[Any, ...]:
        """Index map of queries and output [B, groups, pieces, .., X]."""
        row, piece = self.item(step, items)
        return row, group, piece, 0, 0

    def stored(self, at: int, whole: bool, group: Any, step: Any, *refs: Any) -> tuple[Any, ...]:
        """Index map of page ``at`` of a block, in [L, NP, P, KH]; ``whole``: not of a group's lanes alone."""
        layer, first, items, blocks, table = refs
        row, piece = self.item(step, items)
        entry = blocks[step] * self.pages + at
        needed = entry * self.page < self.tiling.seen(first[row], piece)
        entry = jnp.where(needed | (entry < self.pages), least(entry, self.width - 1), entry - self.pages)
        return layer[0], table[row * self.width + entry], 0, 0 if whole else group


def work_list(paging: Paging, first: Int[Array, "B"]) -> tuple[Int[Array, "Y"], Int[Array, "Y"], Int[Array, ""]]:
    """Item and block of each step, and the number of steps.

    Y is what rows of W pages would need. Comparisons and sums, without a gather: XLA for TPUs keeps them in one fusion.
    """
    tiling = paging.tiling
    entry = jnp.arange(paging.items)
    counts = paging.blocks(jnp.repeat(first, tiling.pieces), entry % tiling.pieces)
    ends = jnp.sum(jnp.where(entry[:, None] >= entry, counts, 0), axis=1)
    step = jnp.arange(paging.items * -(-paging.width // paging.pages))[:, None]
    item = jnp.sum(step >= ends, axis=1)
    block = step[:, 0] - jnp.max(jnp.where(step >= ends, ends, 0), axis=1)
    return least(item, paging.items - 1), block, ends[-1]


def beside(scales: Any) -> Float[Array, "X S"]:
    """The scales of the block's pages, in the order of its slots."""
    return scales[0][...] if len(scales) == 1 else jnp.concatenate([scale[...] for scale in scales], axis=1)
