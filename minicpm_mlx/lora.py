"""LoRA and DoRA fine-tuning.

    python -m minicpm_mlx.lora --model openbmb/MiniCPM-2B-sft-bf16 --data DIR --iters 1000 --adapter-path adapters

``--adapter-path`` gets the adapter in the format of PEFT, ``metrics.jsonl``, ``loss.png`` and ``checkpoints/``.
"""

from typing import TYPE_CHECKING

from minicpm_mlx.backend import trainer

if TYPE_CHECKING:
    pass


if __name__ == "__main__":
    from minicpm_data.training import finetuning
    from minicpm_data.training.options import LoraOptions
    from minicpm_mlx.backend import backend

    finetuning.run(backend, trainer, LoraOptions, "python -m minicpm_mlx.lora")
