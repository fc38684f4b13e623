"""The shapes of the engine's programs, for compiling one before there is an array for it.

`jax.jit` finds a program again only for the same shapes, dtypes and places. So the engine's arrays have one place each:
that of the model over a mesh or on a device, or none where the model has none.

Dims as in engine.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from minicpm_data.generation.constraint import BITS
from minicpm_data.generation.options import GREEDY, CacheOptions
from minicpm_jax.cpu.form import form_of_model
from minicpm_jax.generation import decoding
from minicpm_jax.generation.decoding import State
from minicpm_jax.generation.programs import Key
from minicpm_jax.generation.sampling import SamplingParams
from minicpm_jax.generation.slots import ENDS, insert, mark_finished, row_of
from minicpm_jax.layers.kv_cache import Cache, cache_specs
from minicpm_jax.model import Model


class Shapes:
    """The abstract arrays of an engine for this model."""

    def __init__(self, model: Model, cache_options: CacheOptions):
        self.model, self.bits = model, cache_options.kv_bits
        self._home = decoding.home_of(model)
        self.state, self.row = functools.cache(self._state), functools.cache(self._row)

    def placed(self, value: Any, shape: Any) -> Any:
        """The arrays in the places of a shape. XLA may have left a result of a mesh elsewhere."""

        def put(array, wanted):
            there = isinstance(array, jax.Array) and array.committed and array.sharding == wanted.sharding
            return array if there else jax.device_put(array, wanted.sharding)

        return value if self._home is None else jax.tree.map(put, value, shape)

    def array(self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec | None = None) -> jax.ShapeDtypeStruct:
        """A result of a program: in the place of the model, or over the mesh by ``spec``."""
        mesh = self.model.mesh
        sharding = self._home if mesh is None else NamedSharding(mesh, spec or PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _cache(self, rows: int, length: int) -> Cache:
        model = self.model
        dtype = form_of_model(model).cache_dtype(model)
        cache = jax.eval_shape(lambda: Cache.empty(model.config, rows, length, dtype, self.bits, model.mesh))
        if model.mesh is None:
            return jax.tree.map(lambda x: self.array(x.shape, x.dtype), cache)
        return jax.tree.map(lambda x, spec: self.array(x.shape, x.dtype, spec), cache, cache_specs(cache, model.mesh))

    def _state(self, rows: int, length: int | None) -> State:
        """The state of B rows; ``length`` of None: without a cache."""
        cache: Any = None if length is None else self._cache(rows, length)
        token = self.array((rows,), jnp.int32)
        token_mask = self.array((rows, self.model.config.vocab_size), jnp.bool_)
        rng = self.array((rows,), jax.random.key(0).dtype)
        finished, ends = self.array((rows,), jnp.bool_), self.array((rows, ENDS), jnp.int32)
        return State(cache, token, token_mask, rng, finished, ends)

    def _row(self, length: int) -> tuple[Cache, jax.ShapeDtypeStruct]:
        """The cache of a prompt, and the hidden state of its last token."""
        dtype = self.model.model.norm.weight.dtype
        return self._cache(1, length), self.array((1, 1, self.model.config.hidden_size), dtype)

    def lowered(self, key: Key, rows: int) -> Any:
        """The traced program of a key, for ``rows`` slots. What the host passes has no place."""
        model, vocabulary, sizes = self.model, self.model.config.vocab_size, key.sizes
        number = jax.ShapeDtypeStruct((), jnp.int32)

        def host(dtype, *shape):
            return jax.ShapeDtypeStruct(shape, dtype)

        def params(count):
            return SamplingParams.of_rows([GREEDY] * count, vocabulary)

        def allowed(count):
            return host(jnp.uint32, count, -(-vocabulary // BITS))

        match key.name:
            case "empty":
                return decoding.empty.lower(model, 1, sizes[0], self.bits)
            case "prefill":
                width, length = sizes
                ids, lengths = host(jnp.int32, 1, width), host(jnp.int32, 1)
                return decoding.prefill.lower(model, ids, *self.row(length), number, lengths)
            case "first_token":
                last, nothing = self.row(1)[1], None
                given = host(jnp.bool_, 1, vocabulary), host(jnp.uint32, 1, 2), host(jnp.int32, 1, ENDS)
                sampled = params(1), host(jnp.int32, 1), allowed(1)
                return decoding.first_token.lower(model, nothing, last, *given, *sampled)
            case "insert":
                length, row_length = sizes
                return insert.lower(self.state(rows, length), self.state(1, row_length), number)
            case "row_of":
                length, row_length = sizes
                return row_of.lower(self.state(rows, length).cache, number, number, row_length)
            case "resize":
                held, length = sizes
                return decoding.resize_cache.lower(self.state(rows, held).cache, length)
            case "decode":
                sampled = params(rows), host(jnp.int32, decoding.STEPS, rows), allowed(rows)
                return decoding.decode.lower(model, self.state(rows, sizes[0]), number, *sampled)
            case "mark_finished":
                return mark_finished.lower(self.state(rows, None).finished, number)
        raise AssertionError(key)
