"""Pretraining: muP, AdamW and the warm-up-stable-decay schedule, from a config to a checkpoint.

    python -m minicpm_jax.pretrain --config config.json --tokenizer DIR --data DIR --save-path DIR --iters 5000 ...
    python -m minicpm_jax.pretrain --init-from MODEL --from-step 4500 --tokenizer DIR --data DIR --iters 5000 ...

The second command starts from the weights of a checkpoint, at the given step of the schedule. In this example the
decay starts at step 4500 of 5000. Any checkpoint can be used, also an upcycled mixture of experts.

``--data`` holds ``stable/`` and ``decay/``, each with ``train.jsonl`` and ``valid.jsonl`` of {"text"} or {"messages"}
documents. The decay stage reads ``decay/``, because MiniCPM adds chat data there (arXiv 2404.06395, section 4).
``--save-path`` gets ``metrics.jsonl``, ``loss.png``, ``checkpoints/`` (orbax) and, at the end, ``model/`` (Hugging Face
layout). After Ctrl-C, a kill or a power cut, the same command with ``--resume`` resumes from the last checkpoint.
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
