"""The bar that long reading and writing shows."""


def progress_bar(what: str, total: int):
    """A `tqdm.tqdm` over ``total`` bytes, to be used as a context; ``update(bytes)`` moves it. It is drawn only on a
    terminal, and only where the work takes longer than a second."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, delay=1)  # None: only on a terminal
