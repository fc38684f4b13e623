"""Training states on disk, by orbax: sharded, and written atomically."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import MultiprocessingOptions

from minicpm_data.training.checkpoint_folder import CheckpointFolder
from minicpm_jax.parallel.processes import processes
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed
from weights_io.parameters import parameters
from weights_io.write import unstack_params

ITEM = "default"  # subfolder of the state in the step's folder
STATE, STEP = "state", "step"  # keys of the saved tree; earlier versions saved only the state


class Checkpoints:
    """The states of a run by step, in ``folder``; see `CheckpointFolder`."""

    def __init__(self, folder: Path):
        self._folder = CheckpointFolder(folder.resolve(), processes())
        self._orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())

    @property
    def latest(self) -> int:
        """The latest step; 0 if there is none."""
        return self._folder.latest

    def restore(self, state: Any) -> Any:
        """The latest state, with the shardings of ``state``; ``state`` itself if there is none. Raises `InputError`
        if the checkpoint is damaged."""
        step = self.latest
        if not step:
            return state
        has_sums = self._folder.check(is_old)
        wanted = {STATE: state, STEP: _number(step)} if has_sums else state
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        try:
            found = self._orbax.restore(self._folder.path(step) / ITEM, args=ocp.args.StandardRestore(shapes))
        except jax.errors.JaxRuntimeError:  # out of memory
            raise
        except Exception as error:  # orbax raises bare exceptions for damaged files
            if has_sums:
                raise InputError(
                    f"{self._folder.folder} holds the state of another run ({_reason(error)}); choose another folder."
                ) from error
            raise self._folder.damaged(_reason(error), is_old) from error
        if not has_sums:
            return found
        if int(found[STEP][0]) != step:
            raise self._folder.damaged(f"its state is that of step {found[STEP][0]}", is_old)
        return found[STATE]

    def save(self, step: int, state: Any) -> None:
        """Save a state. Raises `InputError` if it cannot be written; earlier checkpoints are then kept."""

        def write(folder: Path) -> None:
            logging.disable(logging.ERROR)  # orbax logs a traceback of each exception
            try:
                with _own_loops():
                    self._orbax.save(folder / ITEM, args=ocp.args.StandardSave({STATE: state, STEP: _number(step)}))
            except (OSError, ValueError) as error:  # tensorstore raises ValueError, also for a full disk
                for name in ("absl", "asyncio"):  # they log tracebacks of pending writes
                    logging.getLogger(name).setLevel(logging.CRITICAL)
                raise OSError(_reason(error)) from error
            finally:
                logging.disable(logging.NOTSET)

        self._folder.save(step, write)

    def close(self) -> None:
        self._orbax.close()


class _Loop(asyncio.SelectorEventLoop):
    """If a write fails, orbax closes the event loop to which other pending writes report from tensorstore's threads.
    Each of them would print a traceback that cannot be caught."""

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise


class _Policy(asyncio.DefaultEventLoopPolicy):
    """Creates such loops."""

    _loop_factory = _Loop


@contextlib.contextmanager
def _own_loops() -> Iterator[None]:
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_Policy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


def check(folder: Path, step: int) -> None:
    """Raise `InputError` if the checkpoint of a step is damaged."""
    if wrong := CheckpointFolder(folder).wrong(step, is_old):
        raise InputError(f"{folder / str(step)} is damaged ({wrong}); take another step.")


def is_old(folder: Path) -> bool:
    """Whether an earlier version wrote the checkpoint."""
    return not isinstance(_alone().metadata(folder.resolve() / ITEM).tree, dict)


def _alone() -> ocp.PyTreeCheckpointHandler:
    """A handler that reads in this process only."""
    me = jax.process_index()
    alone = MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix="saved")
    return ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)


def _number(step: int) -> np.ndarray:
    """The step as [1]: orbax stores only arrays."""
    return np.array([step], np.int64)


class Saved:
    """The weights of a state on disk. Each is read on request, by this process only. The last one is cached, because
    the tensors of one parameter are consecutive."""

    def __init__(self, folder: Path, step: int):
        self._folder = folder.resolve() / str(step) / ITEM
        self._handler = _alone()
        self._read = functools.lru_cache(maxsize=1)(self._restored)

    def tensors(self, config: ModelConfig) -> dict[str, Computed]:
        """The weights by Hugging Face names. Raises `InputError` if they do not belong to a model of this config."""
        with self._said():
            weights = self._state(self._described)[0]
        for parameter in parameters(config):
            found = tuple(weights[parameter.name].shape) if parameter.name in weights else None
            if found != parameter.shape(config):
                raise InputError(
                    f"{self._folder.parent} is of another model: its {parameter.name} is {found}, and the model's "
                    f"{parameter.shape(config)}."
                )
        return unstack_params(config, {name: SavedArray(functools.partial(self._read, name)) for name in weights})

    @functools.cached_property
    def _described(self) -> Any:
        """The metadata of the saved tree."""
        return self._handler.metadata(self._folder).tree

    @staticmethod
    def _state(saved: Any) -> Any:
        """The state in the saved tree, weights first."""
        return saved[STATE] if isinstance(saved, dict) else saved

    def _restored(self, name: str) -> np.ndarray:
        tree = jax.tree.map(lambda _: ocp.PLACEHOLDER, self._described)
        self._state(tree)[0][name] = 0
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        with self._said():
            args = ocp.args.PyTreeRestore(item=tree, restore_args=how)
            return self._state(self._handler.restore(self._folder, args=args))[0][name]

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax raises bare exceptions for damaged files
            raise InputError(f"{self._folder.parent} is damaged ({_reason(error)}); take another step.") from error


@dataclass(frozen=True)
class SavedArray:
    """An array of a state on disk, with the methods that `unstacked` uses."""

    read: Callable[[], np.ndarray]
    dtype: np.dtype = np.dtype(np.float32)

    def __getitem__(self, place: tuple[int, ...]) -> np.ndarray:
        return self.read()[place]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read()


def _reason(error: Exception) -> str:
    """The last part of tensorstore's message: ``Failed to write 341603 bytes to file 7: No space left on device``."""
    said = str(error).split(" [")[0]
    return said.rpartition('": ')[2].splitlines()[0] if said else type(error).__name__
