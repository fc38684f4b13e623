"""The backend's part of `minicpm_data.training.pretraining`: the initial weights and the finished model."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from minicpm_data.training.finished_model import export_pretrained
from minicpm_data.training.options import PretrainOptions
from minicpm_jax import device
from minicpm_jax.loading import load_weights
from minicpm_jax.model import initialize
from minicpm_jax.parallel.sharding import fraction_per_device, shardings, warn_idle_mesh_axes
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
    """Trains all weights with AdamW in muP's groups. ``mesh``: shards the weights and the rows of a batch."""

    def __init__(self, options: PretrainOptions, bos_token_id: int, mesh: Mesh | None = None):
        self.options = options
        dtype = options.dtype or device.usual_dtype("bfloat16")
        device.check_dtype(dtype)
        super().__init__(options.out, options.batch_size, options.seed, mesh)
        self.config, self.raw_config, weights = initial_weights(options, mesh)
        warn_idle_mesh_axes(self.config, mesh, options.batch_size)
        self.trained = train.FullFinetune(self.config, dtype, mesh)
        self.objective = PackedObjective(bos_token_id, options.grad_checkpoint)
        self.optimizer = optimizers.mup_optimizer(
            self.config, options.beta1, options.beta2, options.weight_decay, options.clip
        )
        self.state = train.init_train_state(weights, self.optimizer, mesh)

    def evaluate(self, batch: Arrays) -> Mapping[str, Any]:
        """Every process runs all rows: there may be fewer rows than the mesh shards."""
        return train.evaluation(self.state[0], None, dict(batch), trained=self.trained, objective=self.objective)

    def export(self) -> None:
        step = self.checkpoints.latest
        del self.state  # free its memory: the export reads the checkpoint

        def write() -> None:
            tensors = Saved(self.options.out / "checkpoints", step).tensors(self.config)
            export_pretrained(self.options, self.config, self.raw_config, tensors)

        self.processes.on_main_process(write)


def initial_weights(
    options: PretrainOptions, mesh: Mesh | None
) -> tuple[ModelConfig, dict[str, Any], dict[str, jax.Array | np.ndarray]]:
    """Config, config.json and float32 weights at the first step. A new model's weights are created on their devices."""

    def check(config: ModelConfig) -> None:
        check_training(config, "adamw", device.free_memory(mesh), fraction_per_device(config, mesh))

    if options.config is not None:
        config = ModelConfig.from_file(options.config)
        check(config)
        where = None if mesh is None else shardings(config, mesh)
        make = jax.jit(lambda key: train.weights_of(initialize(config, key)), out_shardings=where)
        return config, read_json(options.config), make(jax.random.key(options.seed))
    checkpoint = open_model(options.init_from)
    check(checkpoint.config)
    weights = train.weights_of(load_weights(checkpoint, "float32", mesh, dequantize=True, remedy=SMALLER))
    return checkpoint.config, dict(checkpoint.raw_config), weights
