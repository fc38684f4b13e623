"""The key/value cache and its sharding.

Dims as in attention.py: L layers, B batch, T new tokens, S cache slots, K key/value heads, H head dimension.
"""

import dataclasses
import functools
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


def quantize_kv(x: Float[Array, "B T K H"]) -> tuple[Int8[Array, "B T K H"], Float[Array, "B T K"]]:
    """int8 values and one scale per head."""
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), 1e-30) / 127
    return jnp.round(wide / scale[..., None]).astype(jnp.int8), scale


def cache_specs(cache: Cache, mesh: Mesh | AbstractMesh) -> Cache:
    """The `PartitionSpec` of each array of a cache on the ``mesh``: rows over the batch axes that divide them, heads
    over tensor. The lengths are replicated: every device computes the RoPE angles of all rows."""
    rows = row_axes(mesh, cache.k.shape[1]) or None
    heads = "tensor" if "tensor" in mesh.shape else None
    stored, scale = P(None, rows, None, heads), None if cache.k_scale is None else P(None, rows, heads)
    return Cache(stored, stored, P(), scale, scale)
