"""How MiniCPM-V 2.0 cuts a large image into an overview and slices.

Sizes are (width, height) and grids (columns, rows), as in Pillow. Every number is rounded as in the original: Python's
``round`` takes the even neighbor (35 / 14 is 2, 49 / 14 is 4).

Source: slice_image and its helpers in modeling_minicpmv.py of openbmb/MiniCPM-V-2 (3d0e971).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """How an image is resized and cut.

    Attributes:
        overview: size of the whole image as the model sees it.
        grid: columns and rows of slices; None where it is not cut.
        refined: size of the image that is cut; None where it is not.
    """

    overview: Size
    grid: Size | None = None
    refined: Size | None = None

    @property
    def boxes(self) -> Iterator[tuple[int, int, int, int]]:
        """The corners (left, top, right, bottom) of the slices in the refined image, row by row."""
        if self.grid is None or self.refined is None:
            return
        width, height = (size // count for size, count in zip(self.refined, self.grid, strict=True))
        for top in range(0, self.refined[1], height):
            for left in range(0, self.refined[0], width):
                yield left, top, left + width, top + height


def cut_of(size: Size, max_slices: int, scale_resolution: int, patch_size: int) -> Cut:
    """The cut of an image.

    Arguments:
        size: of the image.
        max_slices: most slices beside the overview; 1 or less never cuts.
        scale_resolution: a slice has about the area of a square with this side, in pixels.
        patch_size: pixels; sides are multiples of it.
    """
    width, height = size
    wanted = min(math.ceil(width * height / scale_resolution**2), max_slices)
    if wanted <= 1:
        return Cut(best_resize(size, scale_resolution, patch_size, allow_upscale=True))
    counts = [count for count in (wanted - 1, wanted, wanted + 1) if count != 1 and count <= max_slices]
    grids = [(columns, n // columns) for n in counts for columns in range(1, n + 1) if n % columns == 0]
    grid = min(grids, key=lambda grid: abs(math.log(width / height) - math.log(grid[0] / grid[1])))
    cell = _divisible(width, grid[0]) / grid[0], _divisible(height, grid[1]) / grid[1]
    part = best_resize(cell, scale_resolution, patch_size, allow_upscale=True)
    overview = best_resize(size, scale_resolution, patch_size)
    return Cut(overview, grid, (part[0] * grid[0], part[1] * grid[1]))


def best_resize(size: tuple[float, float], scale_resolution: int, patch_size: int, allow_upscale: bool = False) -> Size:
    """The size of the same shape with the area of ``scale_resolution`` squared, in whole patches. An image of a
    smaller area keeps it, unless ``allow_upscale``."""
    width, height = size
    if allow_upscale or width * height > scale_resolution**2:
        shape = width / height
        height = int(scale_resolution / math.sqrt(shape))
        width = int(height * shape)
    return _divisible(width, patch_size), _divisible(height, patch_size)


def _divisible(length: float, by: int) -> int:
    """The nearest multiple, at least one."""
    return max(round(length / by) * by, by)
