"""What `minicpm_data.training.loop` asks of a backend: steps, losses, checkpoints and the finished adapter or model."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from minicpm_data.datasets.batches import multiple
from minicpm_data.training.options import adapted_layers, export_model, given_adapter
from minicpm_data.training.processes import Alone
from minicpm_mlx import adapters, device
from minicpm_mlx.loading import load_weights
from minicpm_mlx.model import Model
from minicpm_mlx.training import optimizers
from minicpm_mlx.training import step as train
from minicpm_mlx.training.losses import Objective
from minicpm_mlx.training.run_checkpoints import Checkpoints
from weights_io.adapters import read_adapter, save_adapter
from weights_io.checkpoint import Checkpoint, open_checkpoint
from weights_io.memory import ADAPTERS, check_training
from weights_io.write import of_layers

Arrays = Mapping[str, np.ndarray]


class Trainer:
    """Of adapters (`LoraOptions`) or of all weights (`FullOptions`). ``model``: the base, as it was loaded from its
    ``source``, whose tokenizer and config go with a model that is written."""

    def __init__(self, model: Model, options: Any, source: Checkpoint | None = None):
        self.source = source
        self.options, self.config, self.adapter, self.model = options, model.config, options.adapter, model
        self.objective = Objective(options.loss, options.beta, remat=options.grad_checkpoint)
        self.optimiser = optimizers.OPTIMISERS[options.optimizer]()
        self.key = mx.random.key(options.seed)
        self.processes = Alone()
        if self.adapter is None:
            check_training(model.config, options.optimizer, device.free_memory(model))
        else:
            if options.resume_adapter_file is None:
                layers = adapted_layers(options, model.config)
                matrices = adapters.initial(model, self.adapter, layers, self.key)
            else:
                matrices = adapters.from_adapter(model.config, given_adapter(options, model.config))
            adapters.attach(model, matrices, self.adapter.scale, self.adapter.dropout)
        self.dtypes = {name: w.dtype for name, w in tree_flatten(model.trainable_parameters())}
        self.weights = train.weights_of(model)
        self.before = self.weights if options.loss == "dpo" else None
        self.optimiser.init(self.weights)
        self.train_step = train.Step(
            model,
            dtypes=self.dtypes,
            objective=self.objective,
            optimiser=self.optimiser,
            decay=options.weight_decay if options.optimizer in ("adamw", "muon") else 0.0,
            clip=options.clip,
        )
        self.checkpoints = Checkpoints(options.out / "checkpoints")
        model.train()

    def own(self, rows: int) -> Sequence[int]:
        return range(rows)

    def row_width(self, length: int) -> int:
        return multiple(length)

    def step(self, batches: Sequence[Arrays], rate: float, number: int) -> Mapping[str, Any]:
        key = mx.random.key(self.options.seed * 1_000_003 + number)
        self.weights, figures = self.train_step(self.weights, [_arrays(batch) for batch in batches], rate, key)
        mx.async_eval(self.weights, self.optimiser.state, figures)
        return figures

    def evaluate(self, batch: Arrays) -> Mapping[str, Any]:
        self.model.eval()  # no gradient follows
        sums = self.objective(self.model, _arrays(batch))[1]
        self.model.train()
        return sums

    def reference(self, batch: Arrays) -> np.ndarray:
        assert self.before is not None
        train.use_weights(self.model, self.before, self.dtypes)
        self.model.eval()
        sums = np.array(train.log_probabilities(self.model, _arrays(batch)))
        self.model.train()
        train.use_weights(self.model, self.weights, self.dtypes)
        return sums

    def save(self, step: int) -> None:
        self.checkpoints.save(step, {"weights": self.weights, "moments": self.optimiser.state})

    def restore(self) -> int:
        state = self.checkpoints.restore({"weights": self.weights, "moments": self.optimiser.state})
        self.weights, self.optimiser.state = state["weights"], state["moments"]
        train.use_weights(self.model, self.weights, self.dtypes)
        return self.checkpoints.latest

    def export(self) -> None:
        if self.adapter is None:
            weights = of_layers(self.config, {name: np.array(w) for name, w in self.weights.items()})
            export_model(self.options, self.source, weights)
        else:
            adapter = adapters.to_adapter(self.config, adapters.matrices_of(self.model), self.adapter)
            save_adapter(self.options.out, adapter, self.config)

    def load_export(self) -> None:
        if self.adapter is None:
            found = load_weights(open_checkpoint(self.options.out / "model"), "float32", remedy=ADAPTERS)
            self.weights = train.weights_of(found)
            train.use_weights(self.model, self.weights, self.dtypes)
        else:
            adapter = read_adapter(self.options.out, self.config)
            adapters.attach(self.model, adapters.from_adapter(self.config, adapter), adapter.config.scale)
            self.dtypes = {name: w.dtype for name, w in tree_flatten(self.model.trainable_parameters())}
            self.weights = train.weights_of(self.model)
            if self.before is not None and self.options.resume_adapter_file is None:
                self.before = adapters.untrained(self.model)  # of the export's rank

    def close(self) -> None:
        pass


def _arrays(batch: Arrays) -> dict[str, mx.array]:
    return {name: mx.array(array) for name, array in batch.items()}
