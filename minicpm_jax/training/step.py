"""One optimizer step on a dictionary of arrays."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from minicpm_jax.layers.linear import Linear
from minicpm_jax.layers.ops import OwnProduct, Weight, linear
from minicpm_jax.layers.rope import positions_of
from minicpm_jax.model import Model, get_layer, nested
from minicpm_jax.parallel.mesh import ambient_mesh
from minicpm_jax.parallel.sharding import pad_config, pad_or_trim_params, partition_spec, replicated, shardings
from minicpm_jax.training import adapters
from minicpm_jax.training.cross_entropy import token_losses
from minicpm_jax.training.images import with_images
from minicpm_jax.training.losses import Batch, Objective, PackedObjective
from weights_io.config import ModelConfig
from weights_io.parameters import parameters

Weights = dict[str, Any]  # parameter name -> array, or LoRA parameters; float32
State = tuple[Weights, Any]  # weights and the optimizer's moments


@dataclass(frozen=True)
class FullFinetune:
    """Trains every weight: float32 master weights (sharded over a ``mesh``) of a model that computes in ``dtype``.
    Master weights, moments and checkpoints have the shapes of the parameter table; the model is padded when it is
    built."""

    config: ModelConfig
    dtype: str
    mesh: Mesh | None = None  # shards the master weights

    def model(self, base: Model | None, weights: Weights, key: Array | None = None) -> Model:
        """The model of the master weights, in the dtype of the computation."""
        weights = {name: w.astype(self.dtype) for name, w in weights.items()}
        if self.mesh is None:
            return Model(nested(weights), self.config)
        # If tensor does not divide the vocabulary, XLA would shard the optimizer's work and gather its results.
        weights = jax.lax.with_sharding_constraint(weights, shardings(self.config, self.mesh))
        weights = pad_or_trim_params(weights, pad_config(self.config, self.mesh), self.mesh)
        model = Model(nested(weights), self.config, mesh=self.mesh)
        return _transposed(model) if "tensor" in self.mesh.shape else model


class Transposed(OwnProduct):
    """A weight [O, I] whose gradient is summed over the devices of the ambient mesh as [I, O].

    A sum over fsdp that is sharded along its first axis is a reduce-scatter. Sharded along the last axis of a matrix
    that tensor shards too, XLA all-reduces the whole gradient on every device and slices it.
    """

    def __init__(self, weight: nnx.Param | Weight, axes: tuple[str, ...]):
        """``axes``: the logical axes of [O, I]."""
        super().__init__(weight)
        self.axes = axes

    def times(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        weight, mesh = self.weight[...], ambient_mesh()
        assert mesh is not None
        out, width = partition_spec(self.axes, weight.shape, mesh)
        return linear(jax.lax.with_sharding_constraint(weight.T, PartitionSpec(width, out)).T, x)


def _transposed(model: Model) -> Model:
    """Make the layers' matrices `Transposed` whose last axis fsdp shards, according to the parameter table."""
    for parameter in parameters(model.config):
        layer, axes = get_layer(model, parameter.name), parameter.logical_axes()
        if isinstance(layer, Linear) and axes[0] == "layers" and axes[-1] == "embed":
            layer.weight = Transposed(layer.weight, axes[1:])
    return model


@dataclass(frozen=True)
class LoraFinetune:
    """Trains adapters on a frozen base."""

    scale: float
    dropout: float

    def model(self, base: Model | None, weights: Weights, key: Array | None = None) -> Model:
        """The base with adapters. ``key``: dropout key; None: no dropout."""
        assert base is not None
        return adapters.attach(base, weights, self.scale, self.dropout, key)


Trainable = FullFinetune | LoraFinetune
AnyObjective = Objective | PackedObjective


def init_train_state(weights: Weights, optimizer: optax.GradientTransformation, mesh: Mesh | None) -> State:
    """The state before the first step. Moments with the shape of a weight are sharded like it; others are
    replicated, because a restored checkpoint takes the sharding of this state. All arrays are committed to their
    devices, as a step's results are: otherwise the second step would compile again."""
    moments = optimizer.init(weights)
    if mesh is None:
        return jax.device_put((weights, moments), jax.devices()[0])
    moments = jax.tree.map(lambda x: x if isinstance(x.sharding, NamedSharding) else replicated(x, mesh), moments)
    return weights, moments


def restore_sharding(state: State, before: State) -> State:
    """Put a step's results back into the shardings of its inputs. XLA chooses others for some arrays, and the next
    step would compile again."""
    return jax.tree.map(
        lambda x, old: x if x.sharding == old.sharding else jax.device_put(x, old.sharding), state, before
    )


@functools.partial(jax.jit, static_argnames=("trained", "objective", "optimizer"), donate_argnums=0)
def train_step(
    state: State,
    base: Model | None,
    batches: Batch,
    learning_rate: Array,
    key: Array,
    *,
    trained: Trainable,
    objective: AnyObjective,
    optimizer: optax.GradientTransformation,
) -> tuple[State, dict[str, Array]]:
    """One step on micro-batches (arrays [A, B, T]); all tokens have the same weight.

    Returns the state and the metrics: means of the objective's sums, and ``weight`` as a sum. An objective without a
    weight is a mean, of one micro-batch.
    """
    weights, moments = state

    def gradients_of(batch: Batch, key: Array):
        def total(weights):
            return objective(trained.model(base, weights, key), batch)

        (_, sums), gradients = jax.value_and_grad(total, has_aux=True)(weights)
        return sums, gradients

    def add(totals, micro):
        return jax.tree.map(jnp.add, totals, gradients_of(*micro)), None

    micros = batches, jax.random.split(key, len(batches["ids"]))
    first = jax.tree.map(lambda x: x[0], micros)
    if len(batches["ids"]) == 1:
        sums, gradients = gradients_of(*first)
    else:
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients_of, *first))
        (sums, gradients), _ = jax.lax.scan(add, nothing, micros)
    if "weight" in sums:
        weight = jnp.maximum(sums["weight"], 1)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        sums = {name: value / weight for name, value in sums.items()} | {"weight": sums["weight"]}
    updates, moments = optimizer.update(gradients, moments, weights)
    weights = jax.tree.map(lambda w, update: w + learning_rate * update, weights, updates)
    return (weights, moments), sums | {"gradient_norm": optax.global_norm(gradients)}


@functools.partial(jax.jit, static_argnames=("trained", "objective"))
def evaluation(weights: Weights, base: Model | None, batch: Batch, *, trained: Trainable, objective: AnyObjective):
    """The objective's sums over a batch, without a step."""
    return objective(trained.model(base, weights), batch)[1]


@functools.partial(jax.jit, static_argnames="trained")
def log_probabilities(weights: Weights, base: Model | None, batch: Batch, *, trained: Trainable) -> Float[Array, "B"]:
    """Log-probability of each row's targets, summed over the row."""
    model = trained.model(base, weights)
    ids, seen = with_images(model, batch)
    positions = positions_of(model.config, ids.shape, segments=batch["segments"])
    hidden = model.hidden_states(ids, positions, seen)
    return -jnp.sum(token_losses(model, hidden, batch["labels"]), axis=1)


def weights_of(model: Model) -> Weights:
    """The model's arrays by the names of the parameter table and in its shapes, without a mesh's padding."""
    weights = {p.name: functools.reduce(getattr, p.name.split("."), model)[...] for p in parameters(model.config)}
    return weights if model.mesh is None else pad_or_trim_params(weights, model.config, model.mesh)
