"""What `minicpm_data.training.pretraining` asks of a backend: the weights at the first step, and the finished model."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from minicpm_data.training.finished_model import export_pretrained
from minicpm_data.training.options import PretrainOptions
from minicpm_jax import device
from minicpm_jax.loading import load_weights
from minicpm_jax.model import initialise
from minicpm_jax.parallel.sharding import note_idle, shardings, share
from minicpm_jax.training import optimizers
from minicpm_jax.training import step as train
from minicpm_jax.training.losses import PackedObjective
from minicpm_jax.training.run_checkpoints import Saved
from minicpm_jax.training.trainer import Arrays, BaseTrainer
from weights_io.checkpoint import open_model
from weights_io.config import ModelConfig
from weights_io.files.json_text import read_json
from weights_io.memory import SMALLER, check_training


class Pretrainer(BaseTrainer):
    """Of all weights, by AdamW in muP's groups. ``mesh``: over which they and the rows of a batch are spread."""

    def __init__(self, options: PretrainOptions, bos_token_id: int, mesh: Mesh | None = None):
        self.options = options
        dtype = options.dtype or device.usual_dtype("bfloat16")
        device.check_dtype(dtype)
        super().__init__(options.out, options.batch_size, options.seed, mesh)
        self.config, self.raw_config, weights = beginning(options, mesh)
        note_idle(self.config, mesh, options.batch_size)
        self.trained = train.AllWeights(self.config, dtype, mesh)
        self.objective = PackedObjective(bos_token_id, options.grad_checkpoint)
        self.optimiser = optimizers.mup_optimizer(
            self.config, options.beta1, options.beta2, options.weight_decay, options.clip
        )
        self.state = train.beginning(weights, self.optimiser, mesh)

    def evaluate(self, batch: Arrays) -> Mapping[str, Any]:
        """Every process runs all rows, of which there may be fewer than a mesh splits."""
        return train.evaluation(self.state[0], None, dict(batch), trained=self.trained, objective=self.objective)

    def export(self) -> None:
        step = self.checkpoints.latest
        del self.state  # its room: all that is written is on the disk

        def write() -> None:
            tensors = Saved(self.options.out / "checkpoints", step).tensors(self.config)
            export_pretrained(self.options, self.config, self.raw_config, tensors)

        self.processes.once(write)


def beginning(
    options: PretrainOptions, mesh: Mesh | None
) -> tuple[ModelConfig, dict[str, Any], dict[str, jax.Array | np.ndarray]]:
    """Config, config.json and float32 weights at the first step. A new model's are made where they are to be."""

    def check(config: ModelConfig) -> None:
        check_training(config, "adamw", device.free_memory(mesh), share(config, mesh))

    if options.config is not None:
        config = ModelConfig.from_file(options.config)
        check(config)
        where = None if mesh is None else shardings(config, mesh)
        make = jax.jit(lambda key: train.weights_of(initialise(config, key)), out_shardings=where)
        return config, read_json(options.config), make(jax.random.key(options.seed))
    checkpoint = open_model(options.init_from)
    check(checkpoint.config)
    weights = train.weights_of(load_weights(checkpoint, "float32", mesh, remedy=SMALLER))
    return checkpoint.config, dict(checkpoint.raw_config), weights
