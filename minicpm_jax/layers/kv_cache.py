"""The key/value cache and its sharding.

Dims as in attention.py: L layers, B batch, T new tokens, S cache slots, K key/value heads, H head dimension.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Float, Int, Int8

from minicpm_jax.parallel.mesh import row_axes
from minicpm_jax.parallel.sharding import pad_config
from weights_io.config import ModelConfig

GRAIN = 4  # tokens of an entry of a latent cache
STORED = {"k": 2, "v": 2, "k_scale": 3, "v_scale": 3}  # arrays of a cache -> their axis of slots


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["k", "v", "lengths", "k_scale", "v_scale"], meta_fields=[]
)
@dataclass(frozen=True)
class Cache:
    """Keys and values of all layers. Heads are flattened into the last axis: [.., K, 64] would be padded to 128 lanes
    on a TPU.

    An int8 cache has one scale per slot and head: its absolute maximum / 127. Axis X holds the K heads of the
    scales, padded to a multiple of 8 per device (a TPU tile has 8 rows). Otherwise XLA picks another layout and
    transposes the whole scale array in every layer.
    """

    k: Float[Array, "L B S KH"] | Int8[Array, "L B S KH"]
    v: Float[Array, "L B S KH"] | Int8[Array, "L B S KH"]
    lengths: Int[Array, "B"]  # slots filled in each row; slot = position
    k_scale: Float[Array, "L B X S"] | None = None
    v_scale: Float[Array, "L B X S"] | None = None

    @staticmethod
    def empty(
        config: ModelConfig, batch: int, slots: int, dtype: Any, bits: int | None = None, mesh: Mesh | None = None
    ) -> "Cache":
        """A cache of zeros with ``slots`` positions per row. ``bits``: 8 for int8, None for ``dtype``. ``mesh``: the
        model's."""
        if config.is_latent:
            return LatentCache.of_latents(config, batch, slots, dtype, bits)
        config, parts = pad_config(config, mesh), 1 if mesh is None else mesh.shape.get("tensor", 1)
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, batch, slots, heads * config.head_dim)
        lengths = jnp.zeros(batch, jnp.int32)
        if bits is None:
            return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), lengths)
        k, v = jnp.zeros(shape, jnp.int8), jnp.zeros(shape, jnp.int8)
        rows = parts * -(-heads // parts // 8) * 8
        k_scale, v_scale = (jnp.zeros((layers, batch, rows, slots), jnp.float32) for _ in range(2))
        return Cache(k, v, lengths, k_scale, v_scale)

    @property
    def slots(self) -> int:
        """Length S of the cache."""
        return self.k.shape[2]

    @property
    def grain(self) -> int:
        """Slots of one entry along the axis of slots; S is a multiple of it."""
        return 1

    def heads(self, head_dim: int) -> int:
        """K, for heads of ``head_dim``."""
        return self.k.shape[3] // head_dim

    @property
    def paged(self) -> bool:
        """Whether the rows share a pool of pages."""
        return False

    def row_axes(self, mesh: Mesh | AbstractMesh, batch: int) -> tuple[str, ...]:
        """The axes of the mesh that divide ``batch`` rows of this cache: none divides a pool of pages."""
        return () if self.paged else row_axes(mesh, batch)

    def resized(self, slots: int) -> "Cache":
        """The cache padded to at least ``slots`` slots."""
        more = -(-slots // self.grain) - self.slots // self.grain

        def padded(stored, axis):
            return None if stored is None else jnp.pad(stored, [(0, more if i == axis else 0) for i in range(4)])

        return dataclasses.replace(self, **{name: padded(getattr(self, name), axis) for name, axis in STORED.items()})

    def update(self, layer: ArrayLike, k: Array, v: Array, index: Int[Array, "B T"]) -> "Cache":
        """Write k and v [B, T, K, H] of one layer into the slots ``index``. Either all rows write the same T
        consecutive slots, or each row writes one slot of its own."""
        batch, width, heads, _ = k.shape
        together = batch == 1 or width > 1

        def write(stored, new):
            new = new.astype(stored.dtype)
            if together and stored.dtype != jnp.int8:
                return jax.lax.dynamic_update_slice(stored, new[None], (layer, 0, index[0, 0], 0))
            # A TPU updates a slice of int8 in tiles of 8 slots, so XLA would copy all layers out of their tiles of 32
            # and back. A scatter avoids that, but XLA turns a scatter of one row into a slice: so write it twice.
            slots = index
            if index.size == 1:
                new, slots = (jnp.concatenate([x, x], axis=1) for x in (new, slots))
            return stored.at[layer, jnp.arange(batch)[:, None], slots].set(new)

        def write_scale(stored, new):
            new = new.transpose(0, 2, 1)  # [B, K, T]
            if together:
                return jax.lax.dynamic_update_slice(stored, new[None], (layer, 0, 0, index[0, 0]))
            # Element by element: with a scatter of whole heads XLA transposes the scales of all layers.
            return stored.at[layer, jnp.arange(batch)[:, None], jnp.arange(heads), index].set(new[:, :, 0])

        if self.k_scale is None or self.v_scale is None:
            k, v = (x.reshape(batch, width, -1) for x in (k, v))
            return dataclasses.replace(self, k=write(self.k, k), v=write(self.v, v))
        (k, k_scale), (v, v_scale) = quantize_kv(k), quantize_kv(v)
        k, v = (x.reshape(batch, width, -1) for x in (k, v))
        k_scale, v_scale = write_scale(self.k_scale, k_scale), write_scale(self.v_scale, v_scale)
        return Cache(write(self.k, k), write(self.v, v), self.lengths, k_scale, v_scale)

    def read_block(
        self, layer: ArrayLike, row: ArrayLike, slot: ArrayLike, head: ArrayLike, like: Float[Array, "S K H"]
    ) -> tuple[Array, Array]:
        """Keys and values of one row from ``slot`` and key/value ``head`` on, in the shape and dtype of ``like``."""
        size, heads, head_dim = like.shape

        def part(stored, scale):
            block = jax.lax.dynamic_slice(stored, (layer, row, slot, head * head_dim), (1, 1, size, heads * head_dim))
            block = block.reshape(like.shape)
            if scale is None:
                return block.astype(like.dtype)
            scale = jax.lax.dynamic_slice(scale, (layer, row, head, slot), (1, 1, heads, size))[0, 0]
            return (block * scale.T[..., None]).astype(like.dtype)

        return part(self.k, self.k_scale), part(self.v, self.v_scale)


def quantize_kv(x: Float[Array, "... H"]) -> tuple[Int8[Array, "... H"], Float[Array, "..."]]:
    """int8 values and one scale per head, or latent."""
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), 1e-30) / 127
    return jnp.round(wide / scale[..., None]).astype(jnp.int8), scale


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["k", "v", "lengths", "k_scale", "v_scale"], meta_fields=["rank"]
)
@dataclass(frozen=True)
class LatentCache(Cache):
    """Latents [C] and rotary keys [R] of multi-head latent attention. The latents are the values, so ``v`` is None.

    An entry of ``k`` holds `GRAIN` consecutive tokens, first their latents, then their rotary keys: 1,152 numbers in
    MiniCPM3-4B, which fill 9 registers of 128 lanes. One token's 288 would be padded to 384, and XLA would put the
    slots into the lanes and copy the cache to write it.

    An int8 cache has two scales per token: rows 0 to 3 of ``k_scale`` are of the latents, 4 to 7 of the rotary keys.
    """

    k: Float[Array, "L B S/4 4C+4R"] | Int8[Array, "L B S/4 4C+4R"]
    v: None  # type: ignore[assignment]
    k_scale: Float[Array, "L B 8 S/4"] | None = None
    rank: int = 0  # C

    @staticmethod
    def of_latents(config: ModelConfig, batch: int, slots: int, dtype: Any, bits: int | None) -> "LatentCache":
        """`Cache.empty`."""
        rank, entries = config.kv_lora_rank, -(-slots // GRAIN)
        shape = config.num_hidden_layers, batch, entries, GRAIN * (rank + config.qk_rope_head_dim)
        lengths = jnp.zeros(batch, jnp.int32)
        if bits is None:
            return LatentCache(jnp.zeros(shape, dtype), None, lengths, rank=rank)
        scales = jnp.zeros((*shape[:2], 2 * GRAIN, entries), jnp.float32)
        return LatentCache(jnp.zeros(shape, jnp.int8), None, lengths, scales, rank=rank)

    @property
    def slots(self) -> int:
        return self.k.shape[2] * GRAIN

    @property
    def grain(self) -> int:
        return GRAIN

    def heads(self, head_dim: int) -> int:
        return 1

    def update(self, layer: ArrayLike, k: Array, v: Array, index: Int[Array, "B T"]) -> "LatentCache":
        """Write the latents ``k`` [B, T, C] and rotary keys ``v`` [B, T, R] of one layer into the slots ``index``,
        which are consecutive in each row; slots beyond the cache are dropped.

        The entries that hold them are read, merged and written back.
        """
        batch, width = index.shape
        row, start = jnp.arange(batch)[:, None], index[:, :1]
        entries = start // GRAIN + jnp.arange((width + 2 * GRAIN - 2) // GRAIN)  # [B, A]
        if entries.size == 1 and self.k_scale is not None:
            # XLA turns a scatter of one entry into a slice, for which it would copy all layers out of their tiles of 32
            # rows and back: so write it twice.
            entries = jnp.repeat(entries, 2, axis=1)
        token = entries[..., None] * GRAIN + jnp.arange(GRAIN) - start[..., None]  # [B, A, 4]
        new, token = (token >= 0) & (token < width), jnp.clip(token, 0, width - 1)
        where = self.places(row, entries)
        old = self.k.at[layer, *where].get(mode="clip").reshape(*new.shape[:2], -1)

        def merged(old, given):  # [B, A, 4, X] and [B, T, X]
            return jnp.where(new[..., None], given[row[..., None], token].astype(old.dtype), old)

        both, scales = (k, v), self.k_scale
        if scales is not None:
            both, each = zip(*(quantize_kv(x) for x in both), strict=True)  # scales [B, T]
            held = scales.at[layer, where[0], :, where[1]].get(mode="clip")  # [B, A, 8]
            held = jnp.concatenate(
                [
                    merged(held[..., at : at + GRAIN, None], x[..., None])[..., 0]
                    for at, x in zip((0, GRAIN), each, strict=True)
                ],
                axis=-1,
            )
            scales = scales.at[layer, where[0], :, where[1]].set(held, mode="drop")
        parts = zip(jnp.split(old, [GRAIN * self.rank], axis=-1), both, strict=True)
        joint = [merged(x.reshape(*new.shape, -1), given).reshape(*new.shape[:2], -1) for x, given in parts]
        k = self.k.at[layer, *where].set(jnp.concatenate(joint, axis=-1), mode="drop")
        return dataclasses.replace(self, k=k, k_scale=scales)

    def places(self, row: Int[Array, "B 1"], entries: Int[Array, "B A"]) -> tuple[Array, Array]:
        """Where the arrays hold these entries of the rows: the indices of axis 1 and 2."""
        return row, entries

    def entries(
        self, layer: ArrayLike, row: ArrayLike, first: ArrayLike, count: int
    ) -> tuple[Float[Array, "A 4C+4R"], Float[Array, "8 A"] | None]:
        """Consecutive entries of one row, as stored, and their scales."""
        block = jax.lax.dynamic_slice(self.k, (layer, row, first, 0), (1, 1, count, self.k.shape[3]))[0, 0]
        if self.k_scale is None:
            return block, None
        return block, jax.lax.dynamic_slice(self.k_scale, (layer, row, 0, first), (1, 1, 2 * GRAIN, count))[0, 0]

    def read(
        self, layer: ArrayLike, row: ArrayLike, slot: ArrayLike, size: int, dtype: Any
    ) -> tuple[Float[Array, "S C"], Float[Array, "S R"]]:
        """Latents and rotary keys of ``size`` slots of one row, from ``slot`` on. Both are multiples of `GRAIN`."""
        block, scale = self.entries(layer, row, slot // GRAIN, size // GRAIN)
        latent, rope_key = jnp.split(block, [GRAIN * self.rank], axis=-1)
        latent, rope_key = latent.reshape(size, -1), rope_key.reshape(size, -1)
        if scale is not None:
            latent, rope_key = latent * scale[:GRAIN].T.reshape(-1, 1), rope_key * scale[GRAIN:].T.reshape(-1, 1)
        return latent.astype(dtype), rope_key.astype(dtype)

    def read_block(
        self, layer: ArrayLike, row: ArrayLike, slot: ArrayLike, head: ArrayLike, like: Float[Array, "S 1 C+R"]
    ) -> tuple[Array, Array]:
        """`read` as the keys of one head, and the same again as its values, of which the last R are not used."""
        joint = jnp.concatenate(self.read(layer, row, slot, like.shape[0], like.dtype), axis=-1)[:, None]
        return joint, joint


def cache_specs(cache: Cache, mesh: Mesh | AbstractMesh) -> Cache:
    """The `PartitionSpec` of each array of a cache on the ``mesh``: rows over the batch axes that divide them, heads
    over tensor. Latents have no heads: their rows go over tensor too, if it divides them. The lengths are replicated:
    every device computes the RoPE angles of all rows."""
    rows = (*cache.row_axes(mesh, cache.k.shape[1]), *(["tensor"] if rows_over_tensor(cache, mesh) else [])) or None
    heads = "tensor" if "tensor" in mesh.shape and not isinstance(cache, LatentCache) else None
    stored, scale = P(None, rows, None, heads), P(None, rows, heads)
    specs = {"k": stored, "v": stored, "k_scale": scale, "v_scale": scale}
    present = {name: spec for name, spec in specs.items() if getattr(cache, name) is not None}
    return dataclasses.replace(jax.tree.map(lambda _: P(), cache), **present)


def rows_over_tensor(cache: Cache, mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether the rows of a cache are divided over tensor too: those of latents, if it divides them."""
    if mesh is None or "tensor" not in mesh.shape or cache.paged or not isinstance(cache, LatentCache):
        return False
    batch = cache.k.shape[1]
    return batch % (math.prod(mesh.shape[name] for name in row_axes(mesh, batch)) * mesh.shape["tensor"]) == 0
