"""Open an image that anybody may have sent: bounded in time and memory, and refused in a sentence.

Only the formats of photos and drawings are read, none that runs a program or can hold one. The size is checked before
anything is decoded. Of an animation the first frame is taken; a rotation in the EXIF data is applied; transparent parts
become white.
"""

import base64
import binascii
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weights_io.errors import InputError, short
from weights_io.files.regular import open_regular

if TYPE_CHECKING:
    from PIL import Image

Source = Any  # a PIL image, a path, the bytes of a file, or a data: URL
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
NAMES = "PNG, JPEG, WebP, GIF, BMP, TIFF or PPM"
MOST_PIXELS = 100_000_000  # of an image, decoded in 300 MB
MOST_BYTES = 256 << 20  # of a file
DATA = "data:"


def open_image(source: Source, name: str | None = None) -> "Image.Image":
    """Open an image.

    Arguments:
        source: a PIL image, a path, the bytes of a file, or a ``data:`` URL.
        name: what messages call it; None: its path, or "the image".

    Returns:
        The image in RGB, upright.

    Raises:
        InputError: it cannot be read, is damaged, or is too large.
    """
    from PIL import Image

    name = name or (short(os.fspath(source)) if is_path(source) else "the image")
    if isinstance(source, Image.Image):
        return _guarded(name, lambda: _upright(source, name))
    data = _bytes(source, name)

    def decoded() -> "Image.Image":
        Image.init()  # otherwise Pillow knows five formats until it meets another
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _upright(image, name)

    return _guarded(name, decoded)


def is_path(source: Source) -> bool:
    """Whether an image is given by its path."""
    return isinstance(source, os.PathLike) or (isinstance(source, str) and not source.startswith(DATA))


def _bytes(source: Source, name: str) -> bytes:
    """The bytes of a file."""
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str) and source.startswith(DATA):
        data = _of_url(source)
    elif is_path(source):
        path = Path(os.fspath(source)).expanduser()
        with open_regular(path) as file:
            data = file.read(MOST_BYTES + 1)
    else:
        raise InputError(
            f"an image is of type {type(source).__name__}; give a path, bytes, a data: URL or a PIL image."
        )
    if len(data) > MOST_BYTES:
        raise InputError(f"{name} has more than {MOST_BYTES >> 20} MB; make it smaller.")
    if not data:
        raise InputError(f"{name} is empty; give an image in {NAMES}.")
    return data


def _of_url(url: str) -> bytes:
    """The data of a ``data:`` URL."""
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InputError("a data: URL must be data:image/png;base64, and the file in base64.")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InputError("the base64 text of a data: URL is damaged; encode the file again.") from None


def _guarded(name: str, decode: "Callable[[], Image.Image]") -> "Image.Image":
    """What ``decode`` returns; Pillow's errors become one sentence."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a size between Pillow's limits, and damaged metadata
            return decode()
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{name} is no image in {NAMES}; convert it to one of these.") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name} has more than {MOST_PIXELS:,} pixels; make it smaller.") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
        raise InputError(f"{name} is damaged ({short(str(error) or type(error).__name__)}); save it again.") from None


def _upright(image: "Image.Image", name: str) -> "Image.Image":
    from PIL import ImageOps

    width, height = image.size
    if width * height > MOST_PIXELS:
        raise InputError(f"{name} has {width} x {height} pixels, more than {MOST_PIXELS:,}; make it smaller.")
    if width < 1 or height < 1:
        raise InputError(f"{name} has no pixels; give another image.")
    image.load()
    return _rgb(ImageOps.exif_transpose(image) or image, name)


def _rgb(image: "Image.Image", name: str) -> "Image.Image":
    """The image in 8 bits of red, green and blue."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of gray, in Pillow's 16 or 32
        values = np.asarray(image).astype(np.int64)
        high = 65535 if image.mode != "I" or values.max(initial=0) > 255 else 255
        image = Image.fromarray((values.clip(0, high) * 255 // high).astype(np.uint8))
    if image.mode == "F":
        raise InputError(f"{name} has floating-point pixels; save it with 8 bits a color.")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return image if image.mode == "RGB" else image.convert("RGB")
