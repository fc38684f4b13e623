"""A key/value cache in pages: one pool for all rows, and for each row a table of its pages.

Dims as in kv_cache.py; NP pages of the pool, P slots of a page, W pages of a table. The slots of a row are those of its
pages, in the order of its table. Page 0 is nobody's: the tables of empty rows name it, and so do the entries behind a
row's last page.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, Int, Int8

from minicpm_jax.layers.kv_cache import GRAIN, STORED, Cache, LatentCache, quantize_kv
from weights_io.config import ModelConfig


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["k", "v", "lengths", "k_scale", "v_scale", "table"], meta_fields=[]
)
@dataclass(frozen=True)
class PagedCache(Cache):
    """Keys and values of all layers in pages. A row's pages may be anywhere in the pool, and rows may share some.

    Over a mesh every device that has a head holds all its pages: rows are not divided.
    """

    k: Float[Array, "L NP P KH"] | Int8[Array, "L NP P KH"]
    v: Float[Array, "L NP P KH"] | Int8[Array, "L NP P KH"]
    k_scale: Float[Array, "L NP X P"] | None = None
    v_scale: Float[Array, "L NP X P"] | None = None
    table: Int[Array, "B W"] = None  # type: ignore[assignment]

    @staticmethod
    def of_pages(
        config: ModelConfig,
        batch: int,
        pages: int,
        page: int,
        width: int,
        dtype: Any,
        bits: int | None = None,
        mesh: Mesh | None = None,
    ) -> "PagedCache | PagedLatentCache":
        """A pool of zeros.

        Arguments:
            config: the model's config.
            batch: B rows.
            pages: NP, with page 0.
            page: P.
            width: W.
            dtype: of keys and values, unless ``bits`` is 8.
            bits: 8 for int8, None for ``dtype``.
            mesh: the model's.
        """
        pool = Cache.empty(config, pages, page, dtype, bits, mesh)
        stored: dict[str, Any] = {name: getattr(pool, name) for name in STORED}
        stored |= {"lengths": jnp.zeros(batch, jnp.int32), "table": jnp.zeros((batch, width), jnp.int32)}
        return PagedLatentCache(rank=pool.rank, **stored) if isinstance(pool, LatentCache) else PagedCache(**stored)

    @property
    def page(self) -> int:
        """P."""
        return self.k.shape[2]

    @property
    def slots(self) -> int:
        """Slots that a table has room for."""
        return self.table.shape[1] * self.page

    @property
    def grain(self) -> int:
        return self.page

    @property
    def paged(self) -> bool:
        return True

    def with_pool(self, other: "PagedCache") -> "PagedCache":
        """These rows, in the pool of another cache."""
        return dataclasses.replace(self, **{name: getattr(other, name) for name in STORED})

    def row_of(self, pages: Sequence[int]) -> Cache:
        """The text of these pages, in a cache of one row."""
        at, lengths = np.array(pages), jnp.full(1, len(pages) * self.page, jnp.int32)

        def joined(stored: Array | None, axis: int) -> Array | None:
            """Pages side by side along an axis of a page, [L, 1, ..]."""
            if stored is None:
                return None
            part = jnp.moveaxis(stored[:, at], 1, axis + 1)  # [L, .., n, P, ..]
            shape = [*stored.shape[2:]]
            shape[axis] *= len(pages)
            return part.reshape(len(stored), 1, *shape)

        found = {name: joined(getattr(self, name), 1 if name.endswith("scale") else 0) for name in STORED}
        if isinstance(self, PagedLatentCache):
            return LatentCache(lengths=lengths, rank=self.rank, **found)  # type: ignore[arg-type]
        return Cache(lengths=lengths, **found)  # type: ignore[arg-type]

    def update(self, layer: ArrayLike, k: Array, v: Array, index: Int[Array, "B T"]) -> "PagedCache":
        """Write k and v [B, T, K, H] of one layer into the slots ``index`` of each row. Slots beyond a table go into
        page 0."""
        page, offset = in_pages(self.table, index, self.page)
        heads = jnp.arange(k.shape[2])

        def write(stored, new):
            new = new.reshape(*index.shape, -1).astype(stored.dtype)
            at, place = page, offset
            if index.size == 1:  # XLA turns a scatter of one row into a slice; see `Cache.update`
                new, at, place = (jnp.concatenate([x, x], axis=1) for x in (new, at, place))
            return stored.at[layer, at, place].set(new)

        def write_scale(stored, new):
            return stored.at[layer, page[..., None], heads, offset[..., None]].set(new)

        if self.k_scale is None or self.v_scale is None:
            return dataclasses.replace(self, k=write(self.k, k), v=write(self.v, v))
        (k, k_scale), (v, v_scale) = quantize_kv(k), quantize_kv(v)
        return dataclasses.replace(
            self,
            k=write(self.k, k),
            v=write(self.v, v),
            k_scale=write_scale(self.k_scale, k_scale),
            v_scale=write_scale(self.v_scale, v_scale),
        )

    def read_block(
        self, layer: ArrayLike, row: ArrayLike, slot: ArrayLike, head: ArrayLike, like: Float[Array, "S K H"]
    ) -> tuple[Array, Array]:
        """Keys and values of one row from ``slot`` and key/value ``head`` on, in the shape and dtype of ``like``. Slot
        and size are multiples of P."""
        size, heads, head_dim = like.shape
        pages = jax.lax.dynamic_slice(self.table, (row, slot // self.page), (1, size // self.page))[0]

        def of_pages(stored: Array, begin: tuple[Any, ...], shape: tuple[int, ...]) -> Array:
            """A part of each page: one gather, of which XLA copies nothing else."""
            return jax.vmap(lambda page: jax.lax.dynamic_slice(stored, (layer, page, *begin), (1, 1, *shape))[0, 0])(
                pages
            )

        def part(stored, scale):
            block = of_pages(stored, (0, head * head_dim), (self.page, heads * head_dim)).reshape(like.shape)
            if scale is None:
                return block.astype(like.dtype)
            scale = of_pages(scale, (head, 0), (heads, self.page))  # [n, K, P]
            return (block * scale.transpose(0, 2, 1).reshape(size, heads, 1)).astype(like.dtype)

        return part(self.k, self.k_scale), part(self.v, self.v_scale)


def in_pages(table: Int[Array, "B W"], index: Int[Array, "B A"], size: int) -> tuple[Array, Array]:
    """Page, and place in it, of what is at ``index`` in each row, for pages of ``size``. Behind a table: page 0."""
    entry, offset = index // size, index % size
    page = jnp.take_along_axis(table, jnp.clip(entry, 0, table.shape[1] - 1), axis=1)
    return jnp.where(entry < table.shape[1], page, 0), offset


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "lengths", "k_scale", "v_scale", "table"],
    meta_fields=["rank"],
)
@dataclass(frozen=True)
class PagedLatentCache(LatentCache):
    """A `LatentCache` in pages of Q = P / 4 entries."""

    k: Float[Array, "L NP Q 4C+4R"] | Int8[Array, "L NP Q 4C+4R"]
    k_scale: Float[Array, "L NP 8 Q"] | None = None
    table: Int[Array, "B W"] = None  # type: ignore[assignment]

    @property
    def paged(self) -> bool:
        return True

    @property
    def page(self) -> int:
        """P."""
        return self.k.shape[2] * GRAIN

    @property
    def slots(self) -> int:
        return self.table.shape[1] * self.page

    @property
    def grain(self) -> int:
        return self.page

    with_pool, row_of = PagedCache.with_pool, PagedCache.row_of

    def places(self, row: Int[Array, "B 1"], entries: Int[Array, "B A"]) -> tuple[Array, Array]:
        return in_pages(self.table, entries, self.k.shape[2])

    def entries(
        self, layer: ArrayLike, row: ArrayLike, first: ArrayLike, count: int
    ) -> tuple[Float[Array, "A 4C+4R"], Float[Array, "8 A"] | None]:
        size = self.k.shape[2]
        pages = jax.lax.dynamic_slice(self.table, (row, first // size), (1, count // size))[0]
        block = self.k[layer, pages].reshape(count, -1)
        scale = None if self.k_scale is None else self.k_scale[layer, pages]  # [n, 8, Q]
        return block, None if scale is None else scale.swapaxes(0, 1).reshape(2 * GRAIN, count)
