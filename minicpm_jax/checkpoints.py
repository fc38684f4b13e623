"""Training states on disk, by orbax: sharded, and there whole or not at all."""

import functools
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import MultiprocessingOptions

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


class Saved:
    """The weights of a state on the disk, each of which is read when it is asked for, by this process alone. The last
    one is kept: the tensors of one parameter follow each other."""

    def __init__(self, folder: Path, step: int):
        self._folder = folder.resolve() / str(step) / "default"
        me = jax.process_index()
        alone = MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix="saved")
        self._handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        self._read = functools.lru_cache(maxsize=1)(self._restored)

    @functools.cached_property
    def _tree(self) -> Any:
        """The state, weights first, with nothing for each array."""
        found = self._handler.metadata(self._folder).tree
        return jax.tree.map(lambda _: ocp.PLACEHOLDER, found)

    def arrays(self) -> "dict[str, SavedArray]":
        """By the names of the parameter table."""
        return {name: SavedArray(functools.partial(self._read, name)) for name in self._tree[0]}

    def _restored(self, name: str) -> np.ndarray:
        weights, *others = self._tree
        tree = ({**weights, name: 0}, *others)
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return self._handler.restore(self._folder, args=ocp.args.PyTreeRestore(item=tree, restore_args=how))[0][name]


@dataclass(frozen=True)
class SavedArray:
    """An array of a state on the disk, as far as `weights_io.write.unstacked` looks at it."""

    read: Callable[[], np.ndarray]
    dtype: np.dtype = np.dtype(np.float32)

    def __getitem__(self, place: tuple[int, ...]) -> np.ndarray:
        return self.read()[place]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read()


def _reason(error: Exception) -> str:
    """The last part of what tensorstore says: ``Failed to write 341603 bytes to file 7: No space left on device``."""
    return str(error).split(" [")[0].rpartition('": ')[2]
