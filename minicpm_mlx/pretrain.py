"""Pretraining: muP, AdamW and the warm-up-stable-decay schedule, from a config to a checkpoint.

    python -m minicpm_mlx.pretrain --config config.json --tokenizer DIR --data DIR --save-path DIR --iters 5000 ...
    python -m minicpm_mlx.pretrain --init-from MODEL --from-step 4500 --tokenizer DIR --data DIR --iters 5000 ...

The second command starts from the weights of a checkpoint, at the given step of the schedule. In this example the
decay starts at step 4500 of 5000. Any checkpoint can be used, also an upcycled mixture of experts.

``--data`` holds ``stable/`` and ``decay/``, each with ``train.jsonl`` and ``valid.jsonl`` of {"text"} or {"messages"}
documents. The decay stage reads ``decay/``, because MiniCPM adds chat data there (arXiv 2404.06395, section 4).
``--save-path`` gets ``metrics.jsonl``, ``loss.png``, ``checkpoints/`` and, at the end, ``model/`` (Hugging Face
layout). After Ctrl-C, a kill or a power cut, the same command with ``--resume`` resumes from the last checkpoint.
"""

from minicpm_mlx.backend import pretrainer

if __name__ == "__main__":
    from minicpm_data.training import pretraining
    from minicpm_data.training.options import PretrainOptions

    pretraining.run(pretrainer, PretrainOptions, "python -m minicpm_mlx.pretrain")
