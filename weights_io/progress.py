"""The progress bar of long reads and writes."""

import contextlib
import dataclasses
from collections.abc import Iterator

from weights_io.checkpoint import Checkpoint


def progress_bar(what: str, total: int):
    """A `tqdm.tqdm` over ``total`` bytes, to be used as a context manager.

    It is drawn only on a terminal, and only where the work takes longer than a second.
    """
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, delay=1)  # None: only on a terminal


@contextlib.contextmanager
def reading(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """The checkpoint with a progress bar over its bytes, which every read advances, from any thread.

    Where several processes load a model, each reads a part, and its bar ends early.
    """
    with progress_bar("loading", checkpoint.nbytes) as bar:

        def on_read(count: int) -> None:
            with bar.get_lock():
                bar.update(count)

        yield dataclasses.replace(checkpoint, on_read=on_read)
