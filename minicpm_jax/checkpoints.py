"""Training states on disk, by orbax: sharded, and there whole or not at all."""

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import MultiprocessingOptions

from minicpm_data.runs import damaged
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed
from weights_io.parameters import parameters
from weights_io.write import unstacked

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
        try:
            return self._manager.restore(self.latest, args=ocp.args.StandardRestore(shapes))
        except (OSError, ValueError, KeyError) as error:  # tensorstore's errors, of a damaged file too, are ValueErrors
            raise InputError(damaged(self._folder, self._manager.all_steps(), _reason(error))) from error

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

    def tensors(self, config: ModelConfig) -> dict[str, Computed]:
        """By Hugging Face names. `InputError` where they are not those of a model of this config."""
        with self._said():
            weights = self._described[0]
        for parameter in parameters(config):
            found = tuple(weights[parameter.name].shape) if parameter.name in weights else None
            if found != parameter.shape(config):
                raise InputError(
                    f"{self._folder.parent} is of another model: its {parameter.name} is {found}, and the model's "
                    f"{parameter.shape(config)}."
                )
        return unstacked(config, {name: SavedArray(functools.partial(self._read, name)) for name in weights})

    @functools.cached_property
    def _described(self) -> Any:
        """The state, weights first, with what is known of each array."""
        return self._handler.metadata(self._folder).tree

    def _restored(self, name: str) -> np.ndarray:
        weights, *others = jax.tree.map(lambda _: ocp.PLACEHOLDER, self._described)
        tree = ({**weights, name: 0}, *others)
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        with self._said():
            return self._handler.restore(self._folder, args=ocp.args.PyTreeRestore(item=tree, restore_args=how))[0][
                name
            ]

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise InputError(f"{self._folder.parent} is damaged ({_reason(error)}); take another step.") from error


@dataclass(frozen=True)
class SavedArray:
    """An array of a state on the disk, as far as `unstacked` looks at it."""

    read: Callable[[], np.ndarray]
    dtype: np.dtype = np.dtype(np.float32)

    def __getitem__(self, place: tuple[int, ...]) -> np.ndarray:
        return self.read()[place]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read()


def _reason(error: Exception) -> str:
    """The last part of what tensorstore says: ``Failed to write 341603 bytes to file 7: No space left on device``."""
    said = str(error).split(" [")[0]
    return said.rpartition('": ')[2].splitlines()[0] if said else type(error).__name__
