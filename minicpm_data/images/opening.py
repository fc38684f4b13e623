"""Open an image that anybody may have sent: bounded in time and memory, and refused in a sentence.

Only the formats of photos and drawings are read, none that runs a program or can hold one. The size is checked before
anything is decoded, and images are decoded one at a time. Of an animation the first frame is taken; a rotation in the
EXIF data is applied; transparent parts become white; of 16 bits of gray the upper 8 are kept.
"""

import base64
import binascii
import io
import os
import threading
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
MOST_PIXELS = 100_000_000  # of an image, which takes 400 MB, or 800 where it is converted
# Pixels that the scans of a JPEG may touch. A photo has about ten scans. One of 120 bytes costs 60 ms at 81 megapixels.
MOST_WORK = 20 * MOST_PIXELS
SCAN = b"\xff\xda"  # the marker before each scan; compressed data never holds it
MOST_IN_PYTHON = (
    1_000_000  # pixels that a decoder written in Python takes 2 s for: of a compressed BMP, of a PPM of text
)
STRIP = 4_000_000  # pixels that are converted together
MOST_BYTES = 256 << 20  # of a file
LONGEST_PATH = 4096  # characters
DATA = "data:"
# The EXIF orientation, and how the image is turned (the names of `PIL.Image.Transpose`).
ORIENTATION = 0x0112
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
TURNS |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}

_decoding = threading.Lock()  # images together would take several times the memory


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
            _check_work(image, data, name)
            return _upright(image, name)

    return _guarded(name, decoded)


def is_path(source: Source) -> bool:
    """Whether an image is given by its path."""
    return isinstance(source, os.PathLike) or (isinstance(source, str) and not _is_data(source))


def _is_data(source: str) -> bool:
    return source[: len(DATA)].lower() == DATA


def _bytes(source: Source, name: str) -> bytes:
    """The bytes of a file."""
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str) and _is_data(source):
        data = _of_url(source)
    elif is_path(source):
        path = _checked_path(os.fspath(source)).expanduser()
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


def _checked_path(path: str | bytes) -> Path:
    path = os.fsdecode(path)
    if not path or len(path) > LONGEST_PATH:
        raise InputError(f"the path of an image has {len(path):,} characters; give that of a file.")
    if "://" in path:
        raise InputError(f"{short(path)} is a URL; download the image, and give its file.")
    return Path(path)


def _of_url(url: str) -> bytes:
    """The data of a ``data:`` URL."""
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InputError("a data: URL must be data:image/png;base64, and the file in base64.")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InputError("the base64 text of a data: URL is damaged; encode the file again.") from None


def _guarded(name: str, decode: "Callable[[], Image.Image]") -> "Image.Image":
    """What ``decode`` returns; Pillow's errors become one sentence."""
    from PIL import Image, UnidentifiedImageError

    try:
        with _decoding, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a size between Pillow's limits, and damaged metadata
            return decode()
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{name} is no image in {NAMES}; convert it to one of these.") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name} has more than {MOST_PIXELS:,} pixels; make it smaller.") from None
    except MemoryError:
        raise InputError(f"{name} needs more memory than there is; make it smaller.") from None
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
        raise InputError(f"{name} is damaged ({short(str(error) or type(error).__name__)}); save it again.") from None


def _check_work(image: "Image.Image", data: bytes, name: str) -> None:
    """Refuse a file that would be decoded for minutes."""
    from PIL import Image

    if data.startswith(b"\xff\xd8") or image.info.get("compression") == "jpeg":  # the latter in a TIFF
        scans = data.count(SCAN)
        if scans * image.width * image.height > MOST_WORK:
            raise InputError(f"{name} is a JPEG of {scans:,} scans, which take too long; save it again.")
    in_python = any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ()))
    if in_python and image.width * image.height > MOST_IN_PYTHON:
        raise InputError(f"{name} is written so that it takes too long to read; save it as PNG.")


def _upright(image: "Image.Image", name: str) -> "Image.Image":
    from PIL import Image

    width, height = image.size
    if width * height > MOST_PIXELS:
        raise InputError(f"{name} has {width} x {height} pixels, more than {MOST_PIXELS:,}; make it smaller.")
    if width < 1 or height < 1:
        raise InputError(f"{name} has no pixels; give another image.")
    image.load()
    turn = TURNS.get(_orientation(image))
    image = _rgb(image, name)
    return image if turn is None else image.transpose(Image.Transpose[turn])


def _orientation(image: "Image.Image") -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged metadata do not spoil the pixels
        return None


def _rgb(image: "Image.Image", name: str) -> "Image.Image":
    """The image in 8 bits of red, green and blue."""
    from PIL import Image

    if image.mode == "F":
        raise InputError(f"{name} has floating-point pixels; save it with 8 bits a color.")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    deep = image.mode.startswith("I;16") or (image.mode == "I" and np.asarray(image).max() > 255)
    width, height = image.size
    made, rows = Image.new("RGB", image.size), max(1, STRIP // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        made.paste(_rgb_strip(strip, deep), (0, top))
    return made


def _rgb_strip(image: "Image.Image", deep: bool) -> "Image.Image":
    """`_rgb` of a few rows. ``deep``: they have 16 bits of gray."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535 if deep else 255)
        return Image.fromarray((values // 257 if deep else values).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return image.convert("RGB")
