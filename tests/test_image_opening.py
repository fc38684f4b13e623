"""Images that anybody may send: right, or refused in one sentence."""

import base64
import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from minicpm_data.images.opening import open_image
from weights_io.errors import InputError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
NOTHING = (0, 0, 0, 0)


def saved(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(width, height, depth, color, rows, *chunks):
    """A PNG file of packed rows, each after its filter byte. ``color``: 0 gray, 2 RGB, 6 RGBA."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    parts = [header, *(chunk(*part) for part in chunks), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def half():
    """4 x 2 pixels: the left half is red, the right one is blue."""
    image = Image.new("RGB", (4, 2), RED)
    image.paste(BLUE, (2, 0, 4, 2))
    return image


def turned(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def corners(image):
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(form, tmp_path):
    data = saved(half(), form, **({"lossless": True} if form == "WEBP" else {}))
    path = tmp_path / "image"
    path.write_bytes(data)
    url = "data:image/x;base64," + base64.b64encode(data).decode()
    for source in (data, bytearray(data), path, str(path), url, url.replace("data:", "DATA:"), half()):
        image = open_image(source)
        assert image.mode == "RGB" and image.size == (4, 2) and corners(image) == [RED, BLUE] * 2


@pytest.mark.parametrize(
    "orientation, size, wanted",
    [
        (1, (4, 2), [RED, BLUE, RED, BLUE]),
        (2, (4, 2), [BLUE, RED, BLUE, RED]),
        (3, (4, 2), [BLUE, RED, BLUE, RED]),
        (4, (4, 2), [RED, BLUE, RED, BLUE]),
        (5, (2, 4), [RED, RED, BLUE, BLUE]),
        (6, (2, 4), [RED, RED, BLUE, BLUE]),
        (7, (2, 4), [BLUE, BLUE, RED, RED]),
        (8, (2, 4), [BLUE, BLUE, RED, RED]),
        (9, (4, 2), [RED, BLUE, RED, BLUE]),
    ],
)
def test_a_rotation_is_applied(orientation, size, wanted):
    image = open_image(saved(half(), exif=turned(orientation)))
    assert image.size == size and corners(image) == wanted


def test_damaged_metadata_do_not_spoil_the_pixels():
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\0\xff" + b"\x01\x12\0\x03\xff\xff\xff\xff", b"Exif\0\0garbage"):
        assert open_image(saved(Image.new("RGB", (8, 8), RED), "JPEG", exif=exif)).size == (8, 8)


OTHERS = {
    "a pixel": (saved(Image.new("RGB", (1, 1), RED)), RED),
    "a strip": (saved(Image.new("RGB", (20_000, 10), RED)), RED),
    "black and white": (saved(Image.new("1", (9, 9), 1)), WHITE),
    "gray": (saved(Image.new("L", (9, 9), 100)), (100,) * 3),
    "palette": (saved(Image.new("RGB", (9, 9), RED).quantize(2)), RED),
    "CMYK": (saved(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF"), RED),
    "first of a GIF": (saved(half(), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 2))]), RED),
    "first of a PNG": (saved(half(), save_all=True, append_images=[Image.new("RGB", (4, 2))]), RED),
    "16 bits of gray": (saved(Image.fromarray(np.full((9, 9), 0x8001, np.uint16))), (127,) * 3),
    "16 bits of gray, big-endian": (saved(Image.new("I;16B", (9, 9), 0x8001), "TIFF"), (127,) * 3),
    "16 bits a color": (png(1, 1, 16, 2, b"\0" + b"\xff\x80" + b"\0" * 4), RED),
    "16 bits and alpha": (png(1, 1, 16, 6, b"\0" + b"\xff\x80" + b"\0" * 6), WHITE),
    "transparent": (saved(Image.new("RGBA", (9, 9), NOTHING)), WHITE),
    "half transparent": (saved(Image.new("RGBA", (9, 9), (*RED, 51))), (255, 204, 204)),
    "transparent gray": (saved(Image.new("LA", (9, 9), (0, 0))), WHITE),
    "a transparent color": (saved(Image.new("RGB", (9, 9), RED), transparency=RED), WHITE),
    "a transparent color of a palette": (saved(Image.new("P", (9, 9)), transparency=0), WHITE),
    "a palette with alpha": (saved(Image.new("P", (9, 9)), transparency=b"\0"), WHITE),
    "a transparent GIF": (saved(Image.new("P", (9, 9)), "GIF", transparency=0), WHITE),
    "an image of 32 bits": (Image.new("I", (9, 9), 70_000), WHITE),
    "a float image": (Image.new("F", (9, 9), 0.5), None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_pixels(name):
    source, wanted = OTHERS[name]
    if wanted is None:
        with pytest.raises(InputError, match="floating-point"):
            open_image(source)
        return
    image = open_image(source)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == wanted


def test_large_images_are_converted_in_strips():
    alpha = Image.linear_gradient("L").resize((2100, 4000))
    image = Image.new("RGB", alpha.size, RED)
    image.putalpha(alpha)
    whole = Image.alpha_composite(Image.new("RGBA", alpha.size, "white"), image).convert("RGB")
    assert open_image(image).tobytes() == whole.tobytes()


JPEG = saved(Image.new("L", (64, 64)), "JPEG", progressive=True)
SCAN = JPEG[JPEG.rindex(b"\xff\xda") : -2]
BIG = JPEG.replace(struct.pack(">HH", 64, 64), struct.pack(">HH", 9000, 9000), 1)  # the height and the width
BMP = saved(Image.new("P", (8, 8)), "BMP")
PPM = b"P3\n2000 2000\n255\n" + b"0 " * 9
REFUSED = {
    "nothing": (b"", "empty"),
    "text": (b"name,size\n" * 99, "is no image in PNG"),
    "a web page": (b"<html><body>", "is no image in PNG"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image in PNG"),
    "a bomb": (png(50_000, 50_000, 8, 2, b"\0" * 99), "pixels"),
    "a smaller bomb": (png(12_000, 12_000, 8, 2, b"\0" * 99), "12000 x 12000"),
    "no pixels": (png(0, 0, 8, 2, b""), "no image"),
    "a bomb of text": (png(1, 1, 8, 2, b"\0" * 4, (b"zTXt", b"a\0\0" + zlib.compress(b"a" * 9_000_000))), "damaged"),
    "half a PNG": (saved(Image.effect_noise((64, 64), 50))[:2000], "damaged"),
    "half a JPEG": (saved(Image.effect_noise((64, 64), 50), "JPEG")[:1500], "damaged"),
    "a header": (JPEG[:20], "no image"),
    "many scans": (BIG[:-2] + SCAN * 20 + JPEG[-2:], "scans"),
    "run lengths": (BMP[:18] + struct.pack("<IIHHI", 2000, 2000, 1, 8, 1) + BMP[34:], "too long"),
    "numbers as text": (PPM, "too long"),
    "a URL": ("https://example.org/cat.png", "download"),
    "no path": ("", "0 characters"),
    "a long path": ("a" * 5000, "5,000 characters"),
    "a path with a null": ("a\0b", "null"),
    "a folder": (".", "folder"),
    "a device": ("/dev/zero", "device"),
    "no file": ("there/is/none.png", "No such file"),
    "an SVG": ("data:image/svg+xml,<svg/>", "base64"),
    "no base64": ("data:image/png;base64,@@@@", "damaged"),
    "letters beyond": ("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9", "damaged"),
    "a number": (3, "int"),
    "a closed image": (Image.new("RGB", (4, 4)), "damaged"),
    "an empty image": (Image.new("RGB", (0, 5)), "no pixels"),
}
REFUSED["a closed image"][0].close()


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence(name):
    source, why = REFUSED[name]
    with pytest.raises(InputError, match=why) as raised:
        open_image(source)
    said = str(raised.value)
    assert len(said) < 250 and "\n" not in said and said.endswith(".")


def test_a_small_image_may_take_long_for_its_size():
    assert open_image(b"P3\n1 1\n255\n255 0 0").getpixel((0, 0)) == RED
    assert open_image(JPEG[:-2] + SCAN * 20 + JPEG[-2:]).size == (64, 64)


def test_opening_in_threads_leaves_the_warnings_as_they_are():
    before, data = list(warnings.filters), saved(half())
    threads = [threading.Thread(target=lambda: [open_image(data) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
