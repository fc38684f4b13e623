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
from minicpm_jax.generation.sampling import SamplingParams, Scores, no_scores
from minicpm_jax.generation.slots import ENDS, insert, vacate
from minicpm_jax.generation.verification import verify_rows
from minicpm_jax.layers.kv_cache import Cache, cache_specs
from minicpm_jax.layers.paged_cache import PagedCache, PagedLatentCache
from minicpm_jax.model import Model


class Places:
    """The places of the results of a model's programs."""

    def __init__(self, model: Model):
        self.model = model
        self._home = decoding.home_of(model)

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

    def cache(self, shapes: Cache) -> Any:
        """A cache of these shapes."""
        mesh = self.model.mesh
        if mesh is None:
            return jax.tree.map(lambda x: self.array(x.shape, x.dtype), shapes)
        return jax.tree.map(lambda x, spec: self.array(x.shape, x.dtype, spec), shapes, cache_specs(shapes, mesh))

    def hidden(self) -> jax.ShapeDtypeStruct:
        """The hidden state of a prompt's last token, [1, 1, D]."""
        return self.array((1, 1, self.model.config.hidden_size), self.model.model.norm.weight.dtype)


class Shapes(Places):
    """The abstract arrays of an engine for this model, with a pool of ``pages`` of ``page`` tokens and tables of
    ``width`` pages."""

    def __init__(self, model: Model, cache_options: CacheOptions, pages: int, page: int, width: int):
        super().__init__(model)
        self._sizes, self._bits = (pages, page, width), cache_options.kv_bits
        self.state = functools.cache(self._state)

    def _empty_cache(self, rows: int) -> PagedCache | PagedLatentCache:
        model, (pages, page, width) = self.model, self._sizes
        dtype = form_of_model(model).cache_dtype(model)
        return PagedCache.of_pages(model.config, rows, pages, page, width, dtype, self._bits, model.mesh)

    def _cache(self, rows: int) -> PagedCache | PagedLatentCache:
        return self.cache(jax.eval_shape(lambda: self._empty_cache(rows)))

    def _state(self, rows: int, with_cache: bool = True) -> State:
        """The state of B rows."""
        cache: Any = self._cache(rows) if with_cache else None
        token = self.array((rows,), jnp.int32)
        token_counts = self.array((rows, self.model.config.vocab_size), jnp.int32)
        rng = self.array((rows,), jax.random.key(0).dtype)
        finished, ends = self.array((rows,), jnp.bool_), self.array((rows, ENDS), jnp.int32)
        scores = jax.eval_shape(lambda: no_scores(rows, self.model.config.vocab_size))
        return State(cache, token, token_counts, rng, finished, ends, self._placed_scores(scores))

    def _placed_scores(self, scores: Scores) -> Scores:
        return Scores(*(self.array(x.shape, x.dtype) for x in scores))

    def empty(self, rows: int) -> State:
        """A state whose slots are empty."""

        def made() -> State:
            rng = jax.random.split(jax.random.key(0), rows)
            token_counts = jnp.zeros((rows, self.model.config.vocab_size), jnp.int32)
            nobody = jnp.full((rows, ENDS), -1, jnp.int32)
            token, finished = jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool)
            scores = no_scores(rows, self.model.config.vocab_size)
            return State(self._empty_cache(rows), token, token_counts, rng, finished, nobody, scores)

        where = None if self._home is None else jax.tree.map(lambda x: x.sharding, self.state(rows))
        return jax.jit(made, out_shardings=where)()  # each device makes its own part

    @functools.cached_property
    def row(self) -> tuple[PagedCache | PagedLatentCache, jax.ShapeDtypeStruct]:
        """The pool with the table of one prompt, and the hidden state of its last token."""
        return self._cache(1), self.hidden()

    def lowered(self, key: Key, rows: int) -> Any:
        """The traced program of a key, for ``rows`` slots. What the host passes has no place."""
        model, vocabulary = self.model, self.model.config.vocab_size
        number = jax.ShapeDtypeStruct((), jnp.int32)

        def host(dtype, *shape):
            return jax.ShapeDtypeStruct(shape, dtype)

        def params(count):
            return SamplingParams.of_rows([GREEDY] * count, vocabulary)

        def allowed(count):
            return host(jnp.uint32, count, -(-vocabulary // BITS))

        def adapters(count):
            return host(jnp.int32, count) if model.adapters else None

        match key.name:
            case "prefill" | "prefill images":
                ids, lengths = host(jnp.int32, 1, key.sizes[0]), host(jnp.int32, 1)
                seen = host(jnp.float32, *ids.shape, model.config.hidden_size) if "images" in key.name else None
                return decoding.prefill.lower(model, ids, *self.row, number, lengths, ids, adapters(1), seen)
            case "first_token":
                last, nothing = self.hidden(), None
                given = host(jnp.int32, 1, vocabulary), host(jnp.uint32, 1, 2), host(jnp.int32, 1, ENDS)
                sampled = params(1), host(jnp.int32, 1), allowed(1)
                return decoding.first_token.lower(model, nothing, last, *given, *sampled)
            case "insert":
                return insert.lower(self.state(rows), self.state(1, False), number, number)
            case "decode":
                sampled = params(rows), host(jnp.int32, decoding.STEPS, rows), allowed(rows)
                return decoding.decode.lower(model, self.state(rows), number, *sampled, adapters(rows))
            case "verify" | "verify drafts":
                proposed = self.array((rows, *key.sizes), jnp.int32) if "drafts" in key.name else None
                given, forced = host(jnp.int32, rows, *key.sizes), host(jnp.int32, key.sizes[0] + 1, rows)
                state = self.state(rows)
                return verify_rows.lower(model, state, given, proposed, params(rows), forced, allowed(rows))
            case "vacate":
                return vacate.lower(self.state(rows), number)
        raise AssertionError(key)
