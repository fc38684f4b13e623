"""What `minicpm_data.training.loop` asks of a backend: steps, losses, checkpoints and the finished adapter or model."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from minicpm_data.datasets.batches import one_of_few
from minicpm_data.training.options import adapted_layers, export_model, given_adapter
from minicpm_jax import adapters, device
from minicpm_jax.loading import load_weights
from minicpm_jax.model import Model
from minicpm_jax.parallel.mesh import batch_sharding, own_rows, placed_rows
from minicpm_jax.parallel.processes import fetched, processes
from minicpm_jax.parallel.sharding import replicated, share
from minicpm_jax.training import optimizers
from minicpm_jax.training import step as train
from minicpm_jax.training.losses import Objective
from minicpm_jax.training.run_checkpoints import Checkpoints, Saved
from weights_io.adapters import read_adapter, save_adapter
from weights_io.checkpoint import Checkpoint, open_checkpoint
from weights_io.memory import ADAPTERS, check_training

Arrays = Mapping[str, np.ndarray]


class Trainer:
    """Of adapters (`LoraOptions`) or of all weights (`FullOptions`). ``model``: the base, as it was loaded from its
    ``source``, whose tokenizer and config go with a model that is written."""

    def __init__(self, model: Model, options: Any, source: Checkpoint | None = None):
        self.source = source
        self.options, self.config, self.adapter = options, model.config, options.adapter
        self.objective = Objective(options.loss, options.beta, remat=options.grad_checkpoint)
        self.optimiser = optimizers.optimizer(options.optimizer, options.weight_decay, options.clip)
        self.key = jax.random.key(options.seed)
        self.processes = processes()
        sharding = model.model.embed_tokens.weight[...].sharding
        self.mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if self.mesh is not None:
            batch_sharding(self.mesh, options.batch_size)  # refused before anything is written
        self.base: Model | None = model
        self.trained: train.Trained
        if self.adapter is None:
            self.trained = train.AllWeights(model.config, model.model.embed_tokens.weight.dtype.name, self.mesh)
            free = device.free_memory(self.mesh)
            check_training(model.config, options.optimizer, free, share(model.config, self.mesh))
            before = train.weights_of(model)
            weights = {name: jnp.array(w, jnp.float32) for name, w in before.items()}
            self.base = None
        else:
            self.layers = adapted_layers(options, model.config)
            self.trained = train.LowRankWeights(self.adapter.scale, self.adapter.dropout)
            if options.resume_adapter_file is None:
                weights = adapters.initial(model, self.adapter, self.layers, self.key)
            else:
                weights = adapters.from_adapter(model.config, given_adapter(options, model.config))
            before = jax.tree.map(jnp.array, weights)
            if self.mesh is not None:
                before, weights = replicated((before, weights), self.mesh)
        self.before = before if options.loss == "dpo" else None
        self.state: train.State = train.beginning(weights, self.optimiser, self.mesh)

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.options.out / "checkpoints")

    def own(self, rows: int) -> Sequence[int]:
        return own_rows(self.mesh, rows)

    def row_width(self, length: int) -> int:
        return one_of_few(length)

    def step(self, batches: Sequence[Arrays], rate: float, number: int) -> Mapping[str, Any]:
        state, figures = train.train_step(
            self.state,
            self.base,
            self.placed(batches),
            np.float32(rate),
            jax.random.fold_in(self.key, number),
            trained=self.trained,
            objective=self.objective,
            optimiser=self.optimiser,
        )
        self.state = train.where_it_was(state, self.state)
        return figures

    def evaluate(self, batch: Arrays) -> Mapping[str, Any]:
        one = {name: x[0] for name, x in self.placed([batch]).items()}
        return train.evaluation(self.state[0], self.base, one, trained=self.trained, objective=self.objective)

    def reference(self, batch: Arrays) -> np.ndarray:
        one = {name: x[0] for name, x in self.placed([batch]).items()}
        return fetched(train.log_probabilities(self.before, self.base, one, trained=self.trained))

    def placed(self, batches: Sequence[Arrays]) -> Mapping[str, Any]:
        """[A, B, T] of this process's rows of batches [B, T], spread over the devices."""
        sides = 1 if self.options.loss == "sft" else 2
        return placed_rows(stacked(batches), self.mesh, sides * self.options.batch_size)

    def save(self, step: int) -> None:
        self.checkpoints.save(step, self.state)

    def restore(self) -> int:
        self.state = self.checkpoints.restore(self.state)
        return self.checkpoints.latest

    def export(self) -> None:
        if self.adapter is None:  # from the disk, where a process alone can read all of it, a part at a time
            folder, step = self.options.out / "checkpoints", self.checkpoints.latest

            def write() -> None:
                export_model(self.options, self.source, Saved(folder, step).tensors(self.config))

            self.processes.once(write)
        else:
            adapter = adapters.to_adapter(self.config, self.state[0], self.adapter, self.layers)
            self.processes.once(lambda: save_adapter(self.options.out, adapter, self.config))

    def load_export(self) -> None:
        if self.adapter is None:
            found = load_weights(open_checkpoint(self.options.out / "model"), "float32", self.mesh, remedy=ADAPTERS)
            self.state = train.weights_of(found), None
        else:
            adapter = read_adapter(self.options.out, self.config)
            self.trained = train.LowRankWeights(adapter.config.scale, 0.0)
            weights = adapters.from_adapter(self.config, adapter)
            self.state = (weights if self.mesh is None else replicated(weights, self.mesh)), None

    def close(self) -> None:
        if "checkpoints" in vars(self):
            self.checkpoints.close()


def stacked(batches: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """[A, B, T] of batches [B, T]."""
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
