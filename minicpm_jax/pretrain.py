"""Pretraining: muP, AdamW and the warm-up-stable-decay schedule, from a config to a checkpoint.

    python -m minicpm_jax.pretrain --config config.json --tokenizer DIR --data DIR --save-path DIR --iters 5000 ...
    python -m minicpm_jax.pretrain --init-from MODEL --from-step 4500 --tokenizer DIR --data DIR --iters 5000 ...

The second begins with the weights of a checkpoint, at its place in the schedule: 4500 of 5000 steps is where the decay
starts. Any checkpoint will do, an upcycled mixture of experts too.

``--data`` holds ``stable/`` and ``decay/``, each with ``train.jsonl`` and ``valid.jsonl`` of {"text"} or {"messages"}
documents; the decay stage reads the second, as MiniCPM mixes chat data in there (arXiv 2404.06395, section 4).
``--save-path`` gets ``metrics.jsonl``, ``loss.png``, ``checkpoints/`` (orbax) and, at the end, ``model/`` (Hugging Face
layout). Interrupted by Ctrl-C, a kill or a power cut, the same command with ``--resume`` goes on where the last
checkpoint was.
"""

from dataclasses import dataclass

from minicpm_data.training.options import PretrainOptions
from minicpm_jax.backend import pretrainer
from minicpm_jax.options import Placement


@dataclass(frozen=True, kw_only=True)
class Options(Placement, PretrainOptions):
    pass


if __name__ == "__main__":
    from minicpm_data.training import pretraining

    pretraining.run(pretrainer, Options, "python -m minicpm_jax.pretrain")
