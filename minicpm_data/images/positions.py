"""Position tables of the towers and of the resampler, for images of any grid.

There are two interpolations. A tower's table is resized with PyTorch's antialiased bicubic filter (a = -0.5, cut and
normalized at the edge, as Pillow does), MiniCPM-V 1.0's and OmniLMM's resampler's with the plain one (a = -0.75, edge
repeated). Both are separable: a matrix for the rows and one for the columns.
"""

import functools
import math

import numpy as np
from jaxtyping import Float

BASE = 10000.0


@functools.lru_cache(maxsize=64)
def antialiased(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix of ``interpolate(mode="bicubic", antialias=True)`` from ``old`` to ``new`` positions, in float32."""
    scale = old / new
    support, stretch = 2.0 * max(scale, 1.0), 1.0 / max(scale, 1.0)
    matrix = np.zeros((new, old))
    for i in range(new):
        center = scale * (i + 0.5)
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), old)
        weights = np.array([_cubic((j - center + 0.5) * stretch, -0.5) for j in range(first, last)])
        matrix[i, first:last] = weights / weights.sum()
    return matrix.astype(np.float32)


@functools.lru_cache(maxsize=64)
def plain(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix of ``interpolate(mode="bicubic", align_corners=False)`` from ``old`` to ``new`` positions."""
    matrix = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            matrix[i, min(max(j, 0), old - 1)] += _cubic(at - j, -0.75)
    return matrix.astype(np.float32)


def _cubic(x: float, a: float) -> float:
    """Keys' cubic convolution kernel."""
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


@functools.lru_cache(maxsize=64)
def sincos(rows: int, columns: int, width: int) -> Float[np.ndarray, "rows*columns width"]:
    """Sines and cosines of the positions of a grid, row by row: the first half of the width encodes the column, the
    second half the row, each as [sin, cos] of p / 10000^(i / (width / 4)). Computed as the original: angles in float64
    for numpy's sines, then float32."""
    frequencies = 1.0 / BASE ** (np.arange(width // 4, dtype=np.float32) / (width / 4.0))
    row, column = np.meshgrid(np.arange(rows, dtype=np.float32), np.arange(columns, dtype=np.float32), indexing="ij")
    halves = []
    for position in (column, row):
        angles = np.einsum("m,d->md", position.reshape(-1), frequencies)
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=1).astype(np.float32)
