"""Pretraining: muP, AdamW and the warm-up-stable-decay schedule, from a config to a checkpoint.

    python -m minicpm_jax.pretrain --config config.json --tokenizer DIR --data DIR --out DIR --steps 5000 ...
    python -m minicpm_jax.pretrain --init-from MODEL --from-step 4500 --tokenizer DIR --data DIR --out DIR --steps 5000

The second begins with the weights of a checkpoint, at its place in the schedule: 4500 of 5000 steps is where the decay
starts. Any checkpoint will do, an upcycled mixture of experts too.

``--data`` holds ``stable/`` and ``decay/``, each with ``train.jsonl`` and ``valid.jsonl`` of {"text"} or {"messages"}
documents; the decay stage reads the second, as MiniCPM mixes chat data in there (arXiv 2404.06395, section 4).
``--out`` gets ``metrics.jsonl``, ``loss.png``, ``checkpoints/`` (orbax) and, at the end, ``model/`` (Hugging Face
layout). Interrupted by Ctrl-C, a kill or a power cut, the same command with ``--resume`` goes on where the last
checkpoint was.
"""

from typing import TYPE_CHECKING

from minicpm_jax.training.pretraining import (
    Options,
    pretrain,
)
from weights_io import command_line

if TYPE_CHECKING:
    pass


if __name__ == "__main__":
    from minicpm_data.training.processes import leaving_at_interrupts

    with leaving_at_interrupts():
        command_line.run(pretrain, Options, "python -m minicpm_jax.pretrain")
