"""LoRA and DoRA fine-tuning.

    python -m minicpm_jax.lora --model openbmb/MiniCPM-2B-sft-bf16 --data DIR --iters 1000 --adapter-path adapters

``--adapter-path`` gets the adapter in the format of PEFT, ``metrics.jsonl``, ``loss.png`` and ``checkpoints/``.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minicpm_data.training.options import LoraOptions
from minicpm_jax.backend import trainer
from minicpm_jax.options import Placement

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Options(Placement, LoraOptions):
    pass


if __name__ == "__main__":
    from minicpm_data.training import finetuning
    from minicpm_jax.backend import backend

    finetuning.run(backend, trainer, Options, "python -m minicpm_jax.lora")
