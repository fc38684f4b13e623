"""Pretraining: muP, AdamW and the warm-up-stable-decay schedule, from a config to a checkpoint.

    python -m minicpm_mlx.pretrain --config config.json --tokenizer DIR --data DIR --save-path DIR --iters 5000 ...
    python -m minicpm_mlx.pretrain --init-from MODEL --from-step 4500 --tokenizer DIR --data DIR --iters 5000 ...

The second begins with the weights of a checkpoint, at its place in the schedule: 4500 of 5000 steps is where the decay
starts. Any checkpoint will do, an upcycled mixture of experts too.

``--data`` holds ``stable/`` and ``decay/``, each with ``train.jsonl`` and ``valid.jsonl`` of {"text"} or {"messages"}
documents; the decay stage reads the second, as MiniCPM mixes chat data in there (arXiv 2404.06395, section 4).
``--save-path`` gets ``metrics.jsonl``, ``loss.png``, ``checkpoints/`` and, at the end, ``model/`` (Hugging Face
layout). Interrupted by Ctrl-C, a kill or a power cut, the same command with ``--resume`` goes on where the last
checkpoint was.
"""

from minicpm_mlx.backend import pretrainer

if __name__ == "__main__":
    from minicpm_data.training import pretraining
    from minicpm_data.training.options import PretrainOptions

    pretraining.run(pretrainer, PretrainOptions, "python -m minicpm_mlx.pretrain")
