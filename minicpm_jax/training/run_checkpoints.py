"""Training states on disk, by orbax: sharded, and there whole or not at all."""

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

ITEM = "default"  # folder of the state in that of its step
STATE, STEP = "state", "step"  # what is saved; earlier versions saved the state alone


class Checkpoints:
    """The states of a run by step, in ``folder``; see `CheckpointFolder`."""

    def __init__(self, folder: Path):
        self._folder = CheckpointFolder(folder.resolve(), processes())
        self._orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())

    @property
    def latest(self) -> int:
        """Step of the latest; 0 where there is none."""
        return self._folder.latest

    def restore(self, state: Any) -> Any:
        """The latest state, on the devices on which ``state`` is; ``state`` itself where there is none. `InputError`
        where it is damaged."""
        step = self.latest
        if not step:
            return state
        has_sums = self._folder.check(is_old)
        wanted = {STATE: state, STEP: _number(step)} if has_sums else state
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        try:
            found = self._orbax.restore(self._folder.path(step) / ITEM, args=ocp.args.StandardRestore(shapes))
        except jax.errors.JaxRuntimeError:  # no room
            raise
        except Exception as error:  # orbax raises bare ones for damaged files
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
        """Raises `InputError` where it cannot be written; what was saved before is then left."""

        def write(folder: Path) -> None:
            logging.disable(logging.ERROR)  # orbax logs a traceback of what it raises
            try:
                with _own_loops():
                    self._orbax.save(folder / ITEM, args=ocp.args.StandardSave({STATE: state, STEP: _number(step)}))
            except (OSError, ValueError) as error:  # tensorstore's errors, of a full disk too, are ValueErrors
                for name in ("absl", "asyncio"):  # which log tracebacks of the writes that are still under way
                    logging.getLogger(name).setLevel(logging.CRITICAL)
                raise OSError(_reason(error)) from error
            finally:
                logging.disable(logging.NOTSET)

        self._folder.save(step, write)

    def close(self) -> None:
        self._orbax.close()


class _Loop(asyncio.SelectorEventLoop):
    """Where a write fails, orbax closes the loop that others under way report to from tensorstore's threads; each would
    print a traceback, which nobody can catch."""

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise


class _Policy(asyncio.DefaultEventLoopPolicy):
    """Makes such loops."""

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
    """`InputError` where the checkpoint of a step is damaged."""
    if wrong := CheckpointFolder(folder).wrong(step, is_old):
        raise InputError(f"{folder / str(step)} is damaged ({wrong}); take another step.")


def is_old(folder: Path) -> bool:
    """Whether an earlier version wrote it."""
    return not isinstance(_alone().metadata(folder.resolve() / ITEM).tree, dict)


def _alone() -> ocp.PyTreeCheckpointHandler:
    """What reads in this process, whatever the others do."""
    me = jax.process_index()
    alone = MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix="saved")
    return ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)


def _number(step: int) -> np.ndarray:
    """[1]: orbax keeps arrays alone."""
    return np.array([step], np.int64)


class Saved:
    """The weights of a state on the disk, each of which is read when it is asked for, by this process alone. The last
    one is kept: the tensors of one parameter follow each other."""

    def __init__(self, folder: Path, step: int):
        self._folder = folder.resolve() / str(step) / ITEM
        self._handler = _alone()
        self._read = functools.lru_cache(maxsize=1)(self._restored)

    def tensors(self, config: ModelConfig) -> dict[str, Computed]:
        """By Hugging Face names. `InputError` where they are not those of a model of this config."""
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
        """What was saved, with what is known of each array."""
        return self._handler.metadata(self._folder).tree

    @staticmethod
    def _state(saved: Any) -> Any:
        """The state in it, weights first."""
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
        except Exception as error:  # orbax raises bare ones for damaged files
            raise InputError(f"{self._folder.parent} is damaged ({_reason(error)}); take another step.") from error


@dataclass(frozen=True)
class SavedArray:
    """An array of a state on the disk, as far as `unstack_params` looks at it."""

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
