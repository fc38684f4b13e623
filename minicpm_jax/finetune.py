"""Fine-tuning of all parameters: float32 masters, computed in the checkpoint's dtype.

    python -m minicpm_jax.finetune --model openbmb/MiniCPM-2B-sft-bf16 --data DIR --iters 1000 --save-path finetuned

``--save-path`` gets ``model/`` (Hugging Face layout), ``metrics.jsonl``, ``loss.png`` and ``checkpoints/``.
"""

from dataclasses import dataclass

from minicpm_data.finetune_options import FullOptions
from minicpm_jax.lora import trainer
from minicpm_jax.placement import Placement


@dataclass(frozen=True)
class Options(Placement, FullOptions):
    pass


if __name__ == "__main__":
    from minicpm_data import finetuning
    from minicpm_jax.generate import backend

    finetuning.run(backend, trainer, Options, "python -m minicpm_jax.finetune")
