"""Training states on disk, by orbax: sharded, and there whole or not at all."""

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from weights_io.errors import InputError

KEPT = 2


class Checkpoints:
    """The states of a run by step, in ``folder``; the latest `KEPT` of them stay."""

    def __init__(self, folder: Path):
        self._folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

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
        logging.disable(logging.ERROR)  # orbax logs a traceback of what it raises
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state))
        except (OSError, ValueError) as error:  # tensorstore's errors, of a full disk too, are ValueErrors
            for partial in self._folder.glob(f"{step}.*"):
                shutil.rmtree(partial, ignore_errors=True)
            raise InputError(
                f"the checkpoint of step {step} cannot be written ({_reason(error)}); the last one, of step "
                f"{self.latest}, is whole: make room, and --resume."
            ) from error
        finally:
            logging.disable(logging.NOTSET)

    def close(self) -> None:
        self._manager.close()


def _reason(error: Exception) -> str:
    """The last part of what tensorstore says: ``Failed to write 341603 bytes to file 7: No space left on device``."""
    return str(error).split(" [")[0].rpartition('": ')[2]
