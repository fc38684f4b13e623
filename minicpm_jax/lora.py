"""LoRA and DoRA fine-tuning.

    python -m minicpm_jax.lora --model openbmb/MiniCPM-2B-sft-bf16 --data DIR --iters 1000 --adapter-path adapters

``--adapter-path`` gets the adapter in PEFT's form, ``metrics.jsonl``, ``loss.png`` and ``checkpoints/``.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minicpm_data.finetune_options import FinetuneOptions, LoraOptions

if TYPE_CHECKING:
    from minicpm_jax.trainer import Trainer


@dataclass(frozen=True)
class OnMesh(FinetuneOptions):
    mesh: str | None = None
    """How the devices are arranged, such as data=2,fsdp=4; by default all along fsdp."""

    def placement(self) -> dict[str, Any]:
        from minicpm_jax.sharding import make_mesh

        return {"mesh": make_mesh(self.mesh)}


@dataclass(frozen=True)
class Options(OnMesh, LoraOptions):
    pass


def trainer(model: Any, options: Any) -> "Trainer":
    """What the training loop works with."""
    from minicpm_jax.trainer import Trainer  # only now, so that --help answers at once

    return Trainer(model, options)


if __name__ == "__main__":
    from minicpm_data import finetuning
    from minicpm_jax.generate import backend

    finetuning.run(backend, trainer, Options, "python -m minicpm_jax.lora")
