"""The backend's part of `minicpm_data.training.loop`: steps, losses and checkpoints; for fine-tuning also the
initial and the exported adapter or model.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from minicpm_data.datasets.batches import one_of_few
from minicpm_data.datasets.images import alike
from minicpm_data.training.finished_model import export_finetuned
from minicpm_data.training.options import FinetuneOptions, FullOptions, LoraOptions, adapted_layers, given_adapter
from minicpm_jax import device
from minicpm_jax.loading import load_weights
from minicpm_jax.model import Model
from minicpm_jax.parallel.mesh import batch_sharding, local_rows, shard_rows
from minicpm_jax.parallel.processes import fetch, processes
from minicpm_jax.parallel.sharding import fraction_per_device, replicated
from minicpm_jax.training import adapters, optimizers
from minicpm_jax.training import step as train
from minicpm_jax.training.losses import Objective
from minicpm_jax.training.run_checkpoints import Checkpoints, Saved
from weights_io.adapters import read_adapter, save_adapter
from weights_io.checkpoint import Checkpoint, open_checkpoint
from weights_io.memory import ADAPTERS, check_training

Arrays = Mapping[str, np.ndarray]


class BaseTrainer:
    """Steps, losses and checkpoints of whatever a subclass trains. ``folder``: of the run. ``rows``: of a batch,
    sharded over the ``mesh``. Raises `InputError` if the mesh cannot shard them."""

    state: train.State
    trained: train.Trainable
    objective: train.AnyObjective
    optimizer: optax.GradientTransformation
    base: Model | None = None  # the frozen base of adapters

    def __init__(self, folder: Path, rows: int, seed: int, mesh: Mesh | None):
        self.folder, self.rows, self.mesh, self.key = folder, rows, mesh, jax.random.key(seed)
        self.processes = processes()
        if mesh is not None:
            batch_sharding(mesh, rows)  # refuse before anything is written

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints")

    def local_rows(self, rows: int) -> Sequence[int]:
        return local_rows(self.mesh, rows)

    def step(self, batches: Sequence[Arrays], rate: float, number: int) -> Mapping[str, Any]:
        state, figures = train.train_step(
            self.state,
            self.base,
            self.placed(batches),
            np.float32(rate),
            jax.random.fold_in(self.key, number),
            trained=self.trained,
            objective=self.objective,
            optimizer=self.optimizer,
        )
        self.state = train.restore_sharding(state, self.state)
        return figures

    def evaluate(self, batch: Arrays) -> Mapping[str, Any]:
        one = {name: x[0] for name, x in self.placed([batch]).items()}
        return train.evaluation(self.state[0], self.base, one, trained=self.trained, objective=self.objective)

    def placed(self, batches: Sequence[Arrays]) -> Mapping[str, Any]:
        """Batches [B, T] of this process's rows as arrays [A, B, T] sharded over all devices."""
        return shard_rows(stack_batches(batches), self.mesh, self.rows)

    def peak_memory(self) -> int:
        return device.peak_memory()

    def save(self, step: int) -> None:
        self.checkpoints.save(step, self.state)

    def restore(self) -> int:
        self.state = self.checkpoints.restore(self.state)
        return self.checkpoints.latest

    def close(self) -> None:
        if "checkpoints" in vars(self):
            self.checkpoints.close()


class Trainer(BaseTrainer):
    """Trains adapters (`LoraOptions`) or all weights (`FullOptions`). ``model``: the base, as loaded from
    ``source``, whose tokenizer and config are exported with a model."""

    def __init__(self, model: Model, options: FinetuneOptions, source: Checkpoint | None = None):
        sharding = model.model.embed_tokens.weight[...].sharding
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        super().__init__(options.out, options.batch_size, options.seed, mesh)
        self.rows *= 1 if options.loss == "sft" else 2
        self.options, self.config, self.source = options, model.config, source
        self.objective = Objective(options.loss, options.beta, remat=options.grad_checkpoint)
        self.optimizer = optimizers.optimizer(options.optimizer, options.weight_decay, options.clip, model.config)
        if isinstance(options, LoraOptions):
            adapter, self.base = options.adapter, model
            self.trained = train.LoraFinetune(adapter.scale, adapter.dropout)
            if options.resume_adapter_file is None:
                weights = adapters.init_lora_params(model, adapter, adapted_layers(options, model.config), self.key)
            else:
                weights = adapters.from_adapter(model.config, given_adapter(options, model.config))
            before = jax.tree.map(jnp.array, weights)
            if mesh is not None:
                before, weights = replicated((before, weights), mesh)
        else:
            self.trained = train.FullFinetune(model.config, model.model.embed_tokens.weight.dtype.name, mesh)
            free = device.free_memory(mesh)
            check_training(model.config, options.optimizer, free, fraction_per_device(model.config, mesh))
            before = train.weights_of(model)
            weights = {name: jnp.array(w, jnp.float32) for name, w in before.items()}
        self.before = before if options.loss == "dpo" else None
        self.state = train.init_train_state(weights, self.optimizer, mesh)

    def row_width(self, length: int) -> int:
        return one_of_few(length)

    def reference(self, batch: Arrays) -> np.ndarray:
        one = {name: x[0] for name, x in self.placed([batch]).items()}
        return fetch(train.log_probabilities(self.before, self.base, one, trained=self.trained))

    def export(self) -> None:
        options = self.options
        if isinstance(options, LoraOptions):
            layers = adapted_layers(options, self.config)
            adapter = adapters.to_adapter(self.config, self.state[0], options.adapter, layers)
            self.processes.on_main_process(lambda: save_adapter(options.out, adapter, self.config))
        else:  # from the checkpoint: one process can read all of it, a parameter at a time
            assert isinstance(options, FullOptions) and self.source is not None
            saved, source = Saved(self.folder / "checkpoints", self.checkpoints.latest), self.source
            self.processes.on_main_process(lambda: export_finetuned(options, source, saved.tensors(self.config)))

    def load_export(self) -> None:
        if self.base is None:
            found = load_weights(open_checkpoint(self.folder / "model"), "float32", self.mesh, remedy=ADAPTERS)
            self.state = train.weights_of(found), None
        else:
            adapter = read_adapter(self.folder, self.config)
            self.trained = train.LoraFinetune(adapter.config.scale, 0.0)
            weights = adapters.from_adapter(self.config, adapter)
            self.state = (weights if self.mesh is None else replicated(weights, self.mesh)), None


def stack_batches(batches: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """Stack batches [B, T] to [A, B, T]."""
    batches = alike(batches)
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
