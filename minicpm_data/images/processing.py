"""From an image to the pixels that a tower sees.

MiniCPM-V 1.0 and OmniLMM squash an image to a square. MiniCPM-V 2.0 cuts a large one into an overview and slices
(`slicing`); without ``slice_mode`` it takes the image in its own size.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from minicpm_data.images.opening import Source, is_path, open_image
from minicpm_data.images.slicing import Cut, Size, cut_of
from weights_io.errors import InputError
from weights_io.vision.config import VisionConfig

if TYPE_CHECKING:
    from PIL import Image

MOST_PATCHES = 4096  # of an overview or slice, four times the usual: a strip of one patch's height has more


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """An image as the model sees it.

    Attributes:
        size: width and height of the image.
        grid: columns and rows of its slices; None where it is not cut.
        parts: the overview, then the slices row by row, [H, W, 3] each.
        tokens: of all parts in a prompt.
        digest: tells images with other pixels apart.
        vision: of the model.
        path: of its file, as it was given; empty where it has none.
    """

    size: Size
    grid: Size | None
    parts: tuple[UInt8[np.ndarray, "H W 3"], ...]
    digest: bytes
    vision: VisionConfig
    path: str = ""
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", len(self.parts) * self.vision.num_queries)

    def pixels(self, part: int) -> Float[np.ndarray, "3 H W"]:
        """The normalized pixels of a part."""
        mean, deviation = (np.array(values, np.float32)[:, None, None] for values in self.vision.mean_std)
        return (self.parts[part].transpose(2, 0, 1).astype(np.float32) / np.float32(255) - mean) / deviation

    def __str__(self) -> str:
        """``cat.jpg 1200x800: 6 slices + overview, 448 tokens``."""
        slices = len(self.parts) - 1
        what = f"{slices} slices + overview, " if slices else ""
        return f"{Path(self.path).name or 'image'} {self.size[0]}x{self.size[1]}: {what}{self.tokens} tokens"


def process(source: Source, vision: VisionConfig, max_slices: int | None = None) -> ProcessedImage:
    """Open an image and cut it.

    Arguments:
        source: as in `open_image`.
        vision: of the model.
        max_slices: most slices; None: the model's own number.

    Raises:
        InputError: as `open_image`; or it is so long and narrow that it would have too many patches.
    """
    if max_slices is not None and max_slices < 1:
        raise InputError(f"is {max_slices}; it must be at least 1.", option="max_slices")
    image = open_image(source)
    if not vision.slice_mode:
        squashed = image.size if vision.adaptive else (vision.image_size,) * 2
        cut = Cut(squashed)
    else:
        most = vision.max_slices if max_slices is None else max_slices
        cut = cut_of(image.size, most, vision.scale_resolution, vision.patch_size)
    _check(cut, image, vision)
    parts = [_resized(image, cut.overview)]
    if cut.refined is not None:
        refined = _resized(image, cut.refined)
        parts += [refined.crop(box) for box in cut.boxes]
    arrays = tuple(np.asarray(part) for part in parts)
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(array.tobytes())
    return ProcessedImage(image.size, cut.grid, arrays, digest.digest(), vision, str(source) if is_path(source) else "")


def _check(cut: Cut, image: "Image.Image", vision: VisionConfig) -> None:
    boxes = [cut.overview, *((right - left, bottom - top) for left, top, right, bottom in cut.boxes)]
    for width, height in boxes:
        if -(-width // vision.patch_size) * -(-height // vision.patch_size) > MOST_PATCHES:
            raise InputError(
                f"an image of {image.size[0]} x {image.size[1]} pixels would have a part of {width} x {height}, more "
                f"than {MOST_PATCHES:,} patches; crop it, or make it smaller."
            )


def _resized(image: "Image.Image", size: Size) -> "Image.Image":
    from PIL import Image

    return image.resize(size, Image.Resampling.BICUBIC)
