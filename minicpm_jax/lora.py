"""LoRA and DoRA fine-tuning.

    python -m minicpm_jax.lora --model openbmb/MiniCPM-2B-sft-bf16 --data DIR --iters 1000 --adapter-path adapters

``--adapter-path`` gets the adapter in PEFT's form, ``metrics.jsonl``, ``loss.png`` and ``checkpoints/``.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minicpm_data.finetune_options import LoraOptions
from minicpm_jax.placement import Placement

if TYPE_CHECKING:
    from minicpm_jax.trainer import Trainer


@dataclass(frozen=True)
class Options(Placement, LoraOptions):
    pass


def trainer(model: Any, options: Any) -> "Trainer":
    """What the training loop works with."""
    from minicpm_jax.trainer import Trainer  # only now, so that --help answers at once

    return Trainer(model, options)


if __name__ == "__main__":
    from minicpm_data import finetuning
    from minicpm_jax.generate import backend

    finetuning.run(backend, trainer, Options, "python -m minicpm_jax.lora")
