"""Training states on disk, by orbax: sharded, and there whole or not at all."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

KEPT = 2


class Checkpoints:
    """The states of a run by step, in ``folder``; the latest `KEPT` of them stay."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    @property
    def latest(self) -> int:
        """Step of the latest; 0 where there is none."""
        return self._manager.latest_step() or 0

    def restore(self, state: Any) -> Any:
        """The latest state, on the devices on which ``state`` is; ``state`` itself where there is none."""
        if not self.latest:
            return state
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self._manager.restore(self.latest, args=ocp.args.StandardRestore(shapes))

    def save(self, step: int, state: Any) -> None:
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def close(self) -> None:
        self._manager.close()
