"""Full fine-tuning: float32 master weights, computation in the checkpoint's dtype.

    python -m minicpm_mlx.finetune --model openbmb/MiniCPM-2B-sft-bf16 --data DIR --iters 1000 --save-path finetuned

``--save-path`` will hold ``model/`` (Hugging Face layout), ``metrics.jsonl``, ``loss.png`` and ``checkpoints/``.
"""

from minicpm_mlx.backend import trainer

if __name__ == "__main__":
    from minicpm_data.training import finetuning
    from minicpm_data.training.options import FullOptions
    from minicpm_mlx.backend import backend

    finetuning.run(backend, trainer, FullOptions, "python -m minicpm_mlx.finetune")
