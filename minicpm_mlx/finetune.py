"""Fine-tuning of all parameters: float32 masters, computed in the checkpoint's dtype.

    python -m minicpm_mlx.finetune --model openbmb/MiniCPM-2B-sft-bf16 --data DIR --iters 1000 --save-path finetuned

``--save-path`` gets ``model/`` (Hugging Face layout), ``metrics.jsonl``, ``loss.png`` and ``checkpoints/``.
"""

from minicpm_mlx.lora import trainer

if __name__ == "__main__":
    from minicpm_data import finetuning
    from minicpm_data.finetune_options import FullOptions
    from minicpm_mlx.generate import backend

    finetuning.run(backend, trainer, FullOptions, "python -m minicpm_mlx.finetune")
