"""This package's programs with shapes in place of arrays: traced for any devices, compiled for TPUs that need not be
present. No weight is allocated.

Dims: B batch, T new tokens, A micro-batches, S cache slots.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from minicpm_data.generation.options import Sampling
from minicpm_data.option_checks import check_range
from minicpm_jax.generation import decoding
from minicpm_jax.generation.sampling import SamplingParams
from minicpm_jax.layers.kv_cache import Cache, cache_specs
from minicpm_jax.model import Model, abstract, nested
from minicpm_jax.parallel.chips import Topology
from minicpm_jax.parallel.mesh import automatic, batch_sharding, make_mesh
from minicpm_jax.parallel.sharding import pad_config, partition_spec, serving_mesh, shardings
from minicpm_jax.quantization.model import axes_of, in_tiles_model, names_of, quantize_model, released_model
from minicpm_jax.training import adapters, optimizers, step
from minicpm_jax.training.losses import Objective, PackedObjective
from weights_io.adapters import AdapterConfig
from weights_io.checkpoint import config_of
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.parameters import parameters
from weights_io.quantization.released import released_form


class Call(NamedTuple):
    """A program of this package, with the shape, dtype and sharding of every input array."""

    function: Any
    arguments: tuple[Any, ...]
    fixed: dict[str, Any]  # static arguments


Kind = Literal["generate", "prefill", "lora", "finetune", "pretrain"]


@dataclass(frozen=True)
class Job:
    """One program of one model on one topology. The fields are those of `minicpm_jax.fit.Options`."""

    model: str
    topology: Topology
    job: Kind
    batch_size: int
    max_seq_length: int
    dtype: str
    quantize: int | str | None
    head_bits: int | None
    kv_bits: int | None
    mesh: str | None
    grad_checkpoint: bool
    prefill_step_size: int
    rank: int
    targets: tuple[str, ...] | None

    @functools.cached_property
    def config(self) -> ModelConfig:
        return config_of(self.model)

    @property
    def training(self) -> bool:
        return self.job in ("lora", "finetune", "pretrain")

    @property
    def tokens(self) -> int:
        """Tokens of one call; a decode step generates one per row."""
        chunk = min(self.prefill_step_size, self.max_seq_length)
        return self.batch_size * {"generate": 1, "prefill": chunk}.get(self.job, self.max_seq_length)

    @functools.cached_property
    def devices(self) -> Any:
        return self.topology.devices()

    @functools.cached_property
    def placed(self) -> Mesh | None:
        """The mesh; None on a single device."""
        if self.mesh is None and not self.training:
            mesh = serving_mesh(self.config, self.devices)
        else:
            mesh = make_mesh(self.mesh, self.devices)
        return None if mesh is None or mesh.size == 1 else automatic(mesh)

    def traced(self) -> Any:
        """The traced program, a `jax.stages.Traced`."""
        call = self.call
        return call.function.trace(*call.arguments, **call.fixed)

    @property
    def argument_bytes(self) -> int:
        """Bytes of the arguments per chip, without padding; known before compiling."""
        return chip_bytes(self.call.arguments)

    @property
    def held(self) -> dict[str, int]:
        """Bytes per chip of the large arguments: weights, optimizer and cache; without padding."""
        first, second, third, *_ = self.call.arguments
        if self.job == "generate":
            named = {"weights": first, "cache": second.cache}
        elif self.job == "prefill":
            named = {"weights": first, "cache": third}
        elif self.job == "lora":
            named = {"weights": second, "adapter and optimizer": first}
        else:
            named = {"master weights": first[0], "optimizer": first[1]}
        return {name: chip_bytes(tree) for name, tree in named.items()}

    @functools.cached_property
    def call(self) -> "Call":
        """The program and its inputs. Raises `InputError` for an invalid mesh, batch or model."""
        check_range(self, "batch_size", "prefill_step_size", least=1)
        check_range(self, "max_seq_length", least=2)
        self.topology.chip.check_dtype(self.dtype)
        for option in ("quantize", "head_bits"):
            if getattr(self, option) is not None and self.job in ("finetune", "pretrain"):
                raise InputError(
                    f"is for a base that is not trained; leave it out of {{job}} {self.job}.", option, ["job"]
                )
        match self.job:
            case "generate":
                return self._decode()
            case "prefill":
                return self._prefill()
            case "pretrain":
                return self._pretrain()
            case _:
                return self._train()

    def compiled(self) -> Any:
        """The compiled program, a `jax.stages.Compiled`."""
        return compiled(self.traced().lower())

    def _everywhere(self, tree: Any) -> Any:
        """Shapes of replicated arrays."""
        if self.placed is None:
            where: Any = SingleDeviceSharding(self.devices[0])
        else:
            where = NamedSharding(self.placed, PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    def _array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._everywhere(jax.ShapeDtypeStruct(shape, dtype))

    def _model(self) -> Model:
        """The model's shapes as `loading.load` places them, and `quantize_model`."""
        mesh = self.placed
        model = abstract(self.config, self.dtype) if mesh is None else self._over(mesh)
        if self.quantize is not None or self.head_bits is not None:
            model = self._quantized(model)
        return self._everywhere(model) if mesh is None else model

    def _over(self, mesh: Mesh) -> Model:
        """The model's padded shapes, sharded over the mesh."""
        shape, dtype = pad_config(self.config, mesh, packed=self.quantize is not None), jnp.dtype(self.dtype)
        where = shardings(shape, mesh)
        leaves = {
            p.name: jax.ShapeDtypeStruct(p.shape(shape), dtype, sharding=where[p.name]) for p in parameters(self.config)
        }
        return Model(nested(leaves), self.config, mesh=mesh)

    def _quantized(self, model: Model) -> Model:
        packed = jax.eval_shape(self._packed, model)
        if self.placed is None:
            return packed
        rules = {p.name: p.logical_axes() for p in parameters(self.config)}

        def where(path, leaf):
            names = names_of(path)
            axes = rules[".".join(names[: names.index("weight") + 1])]
            spec = partition_spec(axes_of(path, axes, leaf.ndim), leaf.shape, self.placed)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.placed, spec))

        return jax.tree_util.tree_map_with_path(where, packed)

    def _packed(self, model: Model) -> Model:
        if isinstance(self.quantize, int):
            model = quantize_model(model, self.quantize, self.head_bits == 8 or not self.training)
        else:
            form = None if self.quantize is None else released_form(self.quantize, self.model)
            model = released_model(model, form, self.head_bits == 8)
        return in_tiles_model(model) if self.placed is None else model

    def _cache(self) -> Cache:
        given = self.config, self.batch_size, self.slots, self.dtype, self.kv_bits, self.placed
        shapes = jax.eval_shape(lambda: Cache.empty(*given))
        if self.placed is None:
            return self._everywhere(shapes)
        specs = cache_specs(shapes, self.placed)
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.placed, spec)),
            shapes,
            specs,
        )

    @property
    def slots(self) -> int:
        return decoding.bucket_length(self.max_seq_length)

    def _rows(self, dtype: Any) -> Any:
        return self._array((self.batch_size,), dtype)

    def _decode(self) -> Call:
        keys = self._everywhere(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.batch_size)))
        ends = self._array((1,), jnp.int32)
        state = decoding.State(self._cache(), self._rows(jnp.int32), None, keys, self._rows(bool), ends)
        params = self._everywhere(SamplingParams.of(Sampling(), self.config.vocab_size))
        return Call(decoding.decode, (self._model(), state, self._array((), jnp.int32), params), {})

    def _prefill(self) -> Call:
        ids = self._array((self.batch_size, self.tokens // self.batch_size), jnp.int32)
        last = self._array((self.batch_size, 1, self.config.hidden_size), self.dtype)
        start, lengths = self._array((), jnp.int32), self._rows(jnp.int32)
        return Call(decoding.prefill, (self._model(), ids, self._cache(), last, start, lengths), {})

    def _batches(self) -> dict[str, Any]:
        """One micro-batch as [A, B, T]."""
        shape = 1, self.batch_size, self.max_seq_length
        if self.placed is None:
            one = self._array(shape, jnp.int32)
        else:
            one = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(self.placed, self.batch_size))
        return dict.fromkeys(("ids", "labels", "segments"), one)

    def _state(self, optimizer: Any, weights: step.Weights) -> step.State:
        """Moments are sharded like their weights: XLA allocates zeros like their prototype."""

        def where(path, leaf):
            own = next((weights[key.key] for key in path if getattr(key, "key", None) in weights), None)
            same = isinstance(own, jax.ShapeDtypeStruct) and own.shape == leaf.shape
            return own if same else self._array(leaf.shape, leaf.dtype)

        return weights, jax.tree_util.tree_map_with_path(where, jax.eval_shape(optimizer.init, weights))

    def _masters(self) -> step.Weights:
        """float32 master weights of all parameters."""
        table = {p.name: jax.ShapeDtypeStruct(p.shape(self.config), jnp.float32) for p in parameters(self.config)}
        if self.placed is None:
            return self._everywhere(table)
        where = shardings(self.config, self.placed)
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[name]) for name, x in table.items()}

    def _train(self) -> Call:
        objective = Objective(remat=self.grad_checkpoint)
        optimizer = optimizers.optimizer("adamw", 0.01, 1.0, self.config)
        base: Model | None = None
        trained: step.Trainable
        if self.job == "lora":
            base = self._model()
            adapter = AdapterConfig(self.rank, 4.0 * self.rank, 0.1, targets=self.targets)
            trained = step.LoraFinetune(adapter.scale, adapter.dropout)
            layers = range(self.config.num_hidden_layers)
            initial = functools.partial(adapters.init_lora_params, config=adapter, layers=layers, key=jax.random.key(0))
            weights = self._everywhere(jax.eval_shape(initial, base))
        else:
            trained = step.FullFinetune(self.config, self.dtype, self.placed)
            weights = self._masters()
        key = self._everywhere(jax.eval_shape(lambda: jax.random.key(0)))
        arguments = self._state(optimizer, weights), base, self._batches(), self._array((), jnp.float32), key
        return Call(step.train_step, arguments, {"trained": trained, "objective": objective, "optimizer": optimizer})

    def _pretrain(self) -> Call:
        fixed = {
            "trained": step.FullFinetune(self.config, self.dtype, self.placed),
            "objective": PackedObjective(bos_token_id=1, remat=self.grad_checkpoint),
            "optimizer": optimizers.mup_optimizer(self.config, 0.9, 0.95, 0.1, 1.0),
        }
        windows = {"ids": self._batches()["ids"]}
        key = self._everywhere(jax.eval_shape(lambda: jax.random.key(0)))
        state = self._state(fixed["optimizer"], self._masters())
        return Call(step.train_step, (state, None, windows, self._array((), jnp.float32), key), fixed)


def chip_bytes(tree: Any) -> int:
    """Bytes on a chip of a tree of placed shapes, without padding."""

    def size(leaf: Any) -> int:
        bits = 4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize  # which is a byte for int4
        return -(-math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits // 8)

    return sum(map(size, jax.tree.leaves(tree)))


def compiled(lowered: Any) -> Any:
    """Compile without the cache on disk, which cannot reload programs for absent devices."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        return lowered.compile()
    finally:
        jax.config.update(name, before)
