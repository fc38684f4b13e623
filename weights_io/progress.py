"""The bar that long reading and writing shows."""

import contextlib
import dataclasses
from collections.abc import Iterator

from weights_io.checkpoint import Checkpoint


def progress_bar(what: str, total: int):
    """A `tqdm.tqdm` over ``total`` bytes, to be used as a context; ``update(bytes)`` moves it. It is drawn only on a
    terminal, and only where the work takes longer than a second."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, delay=1)  # None: only on a terminal


@contextlib.contextmanager
def reading(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """The same checkpoint, whose reads move a bar over all its bytes (of several processes, each reads a part; of
    several threads, one after the other counts)."""
    with progress_bar("loading", checkpoint.nbytes) as bar:

        def on_read(count: int) -> None:
            with bar.get_lock():
                bar.update(count)

        yield dataclasses.replace(checkpoint, on_read=on_read)
