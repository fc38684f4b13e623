"""The backend's part of `minicpm_data.training.loop`: steps, losses and checkpoints; for fine-tuning also the
initial and the exported adapter or model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from minicpm_data.datasets.batches import multiple
from minicpm_data.training.finished_model import export_finetuned
from minicpm_data.training.options import (
    FinetuneOptions,
    FullOptions,
    LoraOptions,
    adapted_layers,
    given_adapter,
    is_decayed,
)
from minicpm_data.training.processes import SingleProcess
from minicpm_mlx import device
from minicpm_mlx.loading import load_weights
from minicpm_mlx.model import Model
from minicpm_mlx.training import adapters, optimizers
from minicpm_mlx.training import step as train
from minicpm_mlx.training.losses import Objective
from minicpm_mlx.training.run_checkpoints import Checkpoints
from weights_io.adapters import read_adapter, save_adapter
from weights_io.checkpoint import Checkpoint, open_checkpoint
from weights_io.memory import ADAPTERS, check_training
from weights_io.write import of_layers

Arrays = Mapping[str, np.ndarray]


class BaseTrainer:
    """Steps, losses and checkpoints of a ``model``'s trainable parameters, with float32 master weights. ``folder``:
    of the run. ``decay``: weight decay at a learning rate of 1, by name. ``dtype``: of the computation; None: the
    model's own."""

    def __init__(
        self,
        model: Model,
        folder: Path,
        seed: int,
        *,
        objective: train.AnyObjective,
        optimizer: optimizers.Optimizer,
        decay: Mapping[str, float],
        clip: float,
        dtype: mx.Dtype | None = None,
    ):
        self.model, self.folder, self.seed = model, folder, seed
        self.objective, self.optimizer, self.processes = objective, optimizer, SingleProcess()
        self.dtypes = {name: dtype or w.dtype for name, w in tree_flatten(model.trainable_parameters())}
        self.weights = train.weights_of(model)
        if dtype is not None:
            train.use_weights(model, self.weights, self.dtypes)
        optimizer.init(self.weights)
        self.train_step = train.Step(
            model, dtypes=self.dtypes, objective=objective, optimizer=optimizer, decay=decay, clip=clip
        )
        self.checkpoints = Checkpoints(folder / "checkpoints")
        model.train()

    def local_rows(self, rows: int) -> Sequence[int]:
        return range(rows)

    def step(self, batches: Sequence[Arrays], rate: float, number: int) -> Mapping[str, Any]:
        key = mx.random.key(self.seed * 1_000_003 + number)
        self.weights, figures = self.train_step(self.weights, [_arrays(batch) for batch in batches], rate, key)
        mx.async_eval(self.weights, self.optimizer.state, figures)
        return figures

    def evaluate(self, batch: Arrays) -> Mapping[str, Any]:
        self.model.eval()  # no gradient follows
        sums = self.objective(self.model, _arrays(batch))[1]
        self.model.train()
        return sums

    def tensors(self) -> dict[str, Any]:
        """All weights, by Hugging Face names."""
        return of_layers(self.model.config, {name: np.array(w) for name, w in self.weights.items()})

    def peak_memory(self) -> int:
        return device.peak_memory()

    def save(self, step: int) -> None:
        self.checkpoints.save(step, {"weights": self.weights, "moments": self.optimizer.state})

    def restore(self) -> int:
        state = self.checkpoints.restore({"weights": self.weights, "moments": self.optimizer.state})
        self.weights, self.optimizer.state = state["weights"], state["moments"]
        train.use_weights(self.model, self.weights, self.dtypes)
        return self.checkpoints.latest

    def close(self) -> None:
        pass


class Trainer(BaseTrainer):
    """Trains adapters (`LoraOptions`) or all weights (`FullOptions`). ``model``: the base, as loaded from
    ``source``, whose tokenizer and config are exported with a model."""

    def __init__(self, model: Model, options: FinetuneOptions, source: Checkpoint | None = None):
        self.options, self.config, self.source = options, model.config, source
        if isinstance(options, LoraOptions):
            if options.resume_adapter_file is None:
                layers = adapted_layers(options, model.config)
                params = adapters.init_lora_params(model, options.adapter, layers, mx.random.key(options.seed))
            else:
                params = adapters.from_adapter(model.config, given_adapter(options, model.config))
            adapters.attach(model, params, options.adapter.scale, options.adapter.dropout)
        else:
            check_training(model.config, options.optimizer, device.free_memory(model))
        names = [name for name, _ in tree_flatten(model.trainable_parameters())]
        share = options.weight_decay if options.optimizer in ("adamw", "muon") else 0.0
        super().__init__(
            model,
            options.out,
            options.seed,
            objective=Objective(options.loss, options.beta, remat=options.grad_checkpoint),
            optimizer=optimizers.OPTIMIZERS[options.optimizer](),
            decay={name: share for name in names if is_decayed(name, model.config)},
            clip=options.clip,
        )
        self.before = self.weights if options.loss == "dpo" else None

    def row_width(self, length: int) -> int:
        return multiple(length)

    def reference(self, batch: Arrays) -> np.ndarray:
        assert self.before is not None
        train.use_weights(self.model, self.before, self.dtypes)
        self.model.eval()
        sums = np.array(train.log_probabilities(self.model, _arrays(batch)))
        self.model.train()
        train.use_weights(self.model, self.weights, self.dtypes)
        return sums

    def export(self) -> None:
        if isinstance(self.options, LoraOptions):
            adapter = adapters.to_adapter(self.config, adapters.lora_params(self.model), self.options.adapter)
            save_adapter(self.folder, adapter, self.config)
        else:
            assert isinstance(self.options, FullOptions) and self.source is not None
            export_finetuned(self.options, self.source, self.tensors())

    def load_export(self) -> None:
        if not isinstance(self.options, LoraOptions):
            found = load_weights(open_checkpoint(self.folder / "model"), "float32", remedy=ADAPTERS)
            self.weights = train.weights_of(found)
            train.use_weights(self.model, self.weights, self.dtypes)
        else:
            adapter = read_adapter(self.folder, self.config)
            adapters.attach(self.model, adapters.from_adapter(self.config, adapter), adapter.config.scale)
            self.dtypes = {name: w.dtype for name, w in tree_flatten(self.model.trainable_parameters())}
            self.weights = train.weights_of(self.model)
            if self.before is not None and self.options.resume_adapter_file is None:
                self.before = adapters.untrained(self.model)  # of the export's rank


def _arrays(batch: Arrays) -> dict[str, mx.array]:
    return {name: mx.array(array) for name, array in batch.items()}
