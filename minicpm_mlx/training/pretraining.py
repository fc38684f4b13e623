"""The backend's part of `minicpm_data.training.pretraining`: the initial weights and the finished model."""

from typing import Any

import mlx.core as mx

from minicpm_data.training.finished_model import export_pretrained
from minicpm_data.training.options import PretrainOptions
from minicpm_mlx import device
from minicpm_mlx.loading import load_weights
from minicpm_mlx.model import Model, initialize
from minicpm_mlx.training import optimizers
from minicpm_mlx.training.losses import PackedObjective
from minicpm_mlx.training.trainer import BaseTrainer
from weights_io.checkpoint import open_checkpoint
from weights_io.config import ModelConfig
from weights_io.files.json_text import read_json
from weights_io.hub import resolve
from weights_io.memory import SMALLER, check_training


class Pretrainer(BaseTrainer):
    """Trains all weights with AdamW in muP's groups."""

    def __init__(self, options: PretrainOptions, bos_token_id: int):
        self.options = options
        dtype = options.dtype or device.usual_dtype("bfloat16")
        self.config, self.raw_config, model = initial_weights(options)
        super().__init__(
            model,
            options.out,
            options.seed,
            objective=PackedObjective(bos_token_id, options.grad_checkpoint),
            optimizer=optimizers.mup_optimizer(self.config, options.beta1, options.beta2),
            decay=optimizers.mup_decay(self.config, options.weight_decay),
            clip=options.clip,
            dtype=getattr(mx, dtype),
        )

    def export(self) -> None:
        export_pretrained(self.options, self.config, self.raw_config, self.tensors())


def initial_weights(options: PretrainOptions) -> tuple[ModelConfig, dict[str, Any], Model]:
    """Config, config.json and the model in float32 at the first step."""

    def check(config: ModelConfig) -> None:
        check_training(config, "adamw", device.free_memory())

    if options.config is not None:
        config = ModelConfig.from_file(options.config)
        check(config)
        return config, read_json(options.config), initialize(config, mx.random.key(options.seed))
    checkpoint = open_checkpoint(resolve(options.init_from, check=ModelConfig.from_dict))
    check(checkpoint.config)
    return (
        checkpoint.config,
        dict(checkpoint.raw_config),
        load_weights(checkpoint, "float32", dequantize=True, remedy=SMALLER),
    )
