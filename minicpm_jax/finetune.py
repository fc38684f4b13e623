"""Fine-tuning of all parameters: float32 masters, computed in the checkpoint's dtype.

    python -m minicpm_jax.finetune --model openbmb/MiniCPM-2B-sft-bf16 --data DIR --iters 1000 --save-path finetuned

``--save-path`` gets ``model/`` (Hugging Face layout), ``metrics.jsonl``, ``loss.png`` and ``checkpoints/``.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minicpm_data.finetune_options import FullOptions

if TYPE_CHECKING:
    from minicpm_jax.trainer import Trainer


@dataclass(frozen=True)
class Options(FullOptions):
    mesh: str | None = None
    """How the devices are arranged, such as data=2,fsdp=4; by default all along fsdp."""

    def placement(self) -> dict[str, Any]:
        from minicpm_jax.sharding import make_mesh

        return {"mesh": make_mesh(self.mesh)}


def trainer(model: Any, options: Any) -> "Trainer":
    """What the training loop works with."""
    from minicpm_jax.trainer import Trainer  # only now, so that --help answers at once

    return Trainer(model, options)


if __name__ == "__main__":
    from minicpm_data import finetuning
    from minicpm_jax.generate import backend

    finetuning.run(backend, trainer, Options, "python -m minicpm_jax.finetune")
