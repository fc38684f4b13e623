"""Training states on disk, as safetensors, there whole or not at all."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from minicpm_data.training.checkpoint_folder import CheckpointFolder
from weights_io.errors import InputError

FILE = "state.safetensors"
STEP = "step"  # metadata key; earlier versions wrote none


class Checkpoints:
    """The states of a run by step, in ``folder``; see `CheckpointFolder`."""

    def __init__(self, folder: Path):
        self._folder = CheckpointFolder(folder)

    @property
    def latest(self) -> int:
        """The latest step; 0 if there is none."""
        return self._folder.latest

    def restore(self, state: Any) -> Any:
        """The latest state, with the structure of ``state``; ``state`` itself if there is none. Raises `InputError`
        if the checkpoint is damaged."""
        step = self.latest
        if not step:
            return state
        self._folder.check(_is_old)
        try:
            found, metadata = _read(self._folder.path(step))
            mx.eval(found)
        except RuntimeError as error:  # MLX raises a bare RuntimeError for a damaged file
            raise self._folder.damaged(str(error), _is_old) from error
        if metadata.get(STEP, str(step)) != str(step):
            raise self._folder.damaged(f"its state is that of step {metadata[STEP]}", _is_old)
        wanted = {name: array.shape for name, array in tree_flatten(state)}
        if {name: array.shape for name, array in found.items()} != wanted:
            raise InputError(f"{self._folder.folder} holds the state of another run; choose another folder.")
        return tree_map_with_path(lambda name, _: found[name], state)  # by path: keys contain dots

    def save(self, step: int, state: Any) -> None:
        """Save a state. Raises `InputError` if it cannot be written; earlier checkpoints are then kept."""

        def write(folder: Path) -> None:
            try:
                mx.save_safetensors(str(folder / FILE), dict(tree_flatten(state)), {STEP: str(step)})
            except RuntimeError as error:  # MLX raises a bare RuntimeError for a full disk
                raise OSError(str(error)) from error

        self._folder.save(step, write)


def _read(folder: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays of a checkpoint (lazy) and the file's metadata."""
    found: Any = mx.load(str(folder / FILE), return_metadata=True)
    return found


def _is_old(folder: Path) -> bool:
    """Whether an earlier version wrote the checkpoint."""
    return STEP not in _read(folder)[1]
