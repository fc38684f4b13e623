"""Training states on disk, as safetensors, there whole or not at all."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from minicpm_data.runs import damaged
from weights_io.errors import InputError

KEPT = 2
FILE = "state.safetensors"


class Checkpoints:
    """The states of a run by step, in ``folder``; the latest `KEPT` of them stay."""

    def __init__(self, folder: Path):
        self._folder = folder

    @property
    def _steps(self) -> list[int]:
        return sorted(int(path.parent.name) for path in self._folder.glob(f"*/{FILE}") if path.parent.name.isdigit())

    @property
    def latest(self) -> int:
        """Step of the latest; 0 where there is none."""
        return max(self._steps, default=0)

    def restore(self, state: Any) -> Any:
        """The latest state; ``state`` itself, which has its form, where there is none."""
        if not self.latest:
            return state
        try:
            found: Any = mx.load(str(self._folder / str(self.latest) / FILE))
        except RuntimeError as error:  # MLX has no error of its own for a damaged file
            raise InputError(damaged(self._folder, self._steps, error)) from error
        wanted = {name: array.shape for name, array in tree_flatten(state)}
        if {name: array.shape for name, array in found.items()} != wanted:
            raise InputError(f"{self._folder} holds the state of another run; choose another folder.")
        return tree_map_with_path(lambda name, _: found[name], state)  # keys with dots in them stay whole

    def save(self, step: int, state: Any) -> None:
        partial, done = self._folder / f"{step}.partial", self._folder / str(step)
        for left in self._folder.glob("*.partial"):  # of a run that was killed
            shutil.rmtree(left)
        try:
            partial.mkdir(parents=True)
            mx.save_safetensors(str(partial / FILE), dict(tree_flatten(state)))
            partial.rename(done)
        except (OSError, RuntimeError) as error:  # MLX has no error of its own for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise InputError(
                f"the checkpoint of step {step} cannot be written ({error}); the last one, of step {self.latest}, is "
                "whole: make room, and --resume."
            ) from error
        for old in self._steps[:-KEPT]:
            shutil.rmtree(self._folder / str(old))
