"""Regions of an image that an answer names: ``<ref>a cat</ref><box>120 80 640 910</box>``.

A model writes a point as ``<point>x y</point>``, a rectangle as ``<box>`` with its left, top, right and bottom, and
four corners as ``<quad>``; the text before it in ``<ref>`` says what is there. Coordinates are whole thousandths of the
width and height of the image, however it was resized or cut.

Source: the maintainers' answers in OpenBMB/MiniCPM-V, issues 185 (the tags), 772 and 982 (thousandths, ``<ref>``).
"""

import re
from dataclasses import dataclass

Point = tuple[int, int]

POINTS = {"point": 1, "box": 2, "quad": 4}
# The special tokens that are text in an answer and in a question, because they are of use there.
REGION_TAGS = frozenset(tag for name in (*POINTS, "ref") for tag in (f"<{name}>", f"</{name}>"))
WHOLE = 1000  # of the width and of the height
# Neither part can hold the beginning of another, so that the time is linear in the text.
PIECE = re.compile(
    r"<ref>(?P<label>(?:(?!</?ref>).)*)</ref>|<(?P<kind>point|box|quad)>(?P<at>[^<>]*)</(?P=kind)>", re.S
)
NUMBERS = re.compile(r"[\s()\[\],]*\d{1,4}(?:[\s()\[\],]+\d{1,4})*[\s()\[\],]*")
BETWEEN = re.compile(r"[\s,;:、，；：]*")  # a label and its regions


@dataclass(frozen=True)
class Region:
    """A place in an image.

    Attributes:
        kind: point, box or quad.
        points: (x, y) in thousandths, of a box the top left and the bottom right corner.
        label: what is there; empty where the answer does not say.
        start, end: of the tags with the coordinates, in characters of the answer.
    """

    kind: str
    points: tuple[Point, ...]
    label: str
    start: int
    end: int

    def outline(self, size: tuple[int, int]) -> list[tuple[float, float]]:
        """The point or the corners, clockwise, in pixels of an image with this width and height."""
        points = list(self.points)
        if self.kind == "box":
            (left, top), (right, bottom) = points
            points = [(left, top), (right, top), (right, bottom), (left, bottom)]
        return [(x * size[0] / WHOLE, y * size[1] / WHOLE) for x, y in points]


def regions(answer: str) -> list[Region]:
    """The regions in an answer, in order. Tags that hold anything but coordinates are text."""
    found, label, after = [], "", -1
    for piece in PIECE.finditer(answer):
        if piece["kind"] is None:
            label, after = " ".join(piece["label"].split()), piece.end()
            continue
        points = _points(piece["kind"], piece["at"])
        if points is None:
            continue
        near = after >= 0 and BETWEEN.fullmatch(answer, after, piece.start())
        found.append(Region(piece["kind"], points, label if near else "", *piece.span()))
        after = piece.end() if near else -1  # a label may have several regions
    return found


def without_tags(answer: str) -> str:
    """The answer as a text for readers: labels stay, coordinates do not."""
    text, at = [], 0
    for region in regions(answer):
        text.append(answer[at : region.start])
        at = region.end
    return re.sub(r"</?ref>", "", "".join([*text, answer[at:]]))


def _points(kind: str, text: str) -> tuple[Point, ...] | None:
    """The points of a region; None where the text is no list of coordinates."""
    if not NUMBERS.fullmatch(text):
        return None
    values = [int(value) for value in re.findall(r"\d+", text)]
    if len(values) != 2 * POINTS[kind] or max(values) > WHOLE:
        return None
    points = tuple(zip(values[::2], values[1::2], strict=True))
    if kind == "box":
        columns, rows = zip(*points, strict=True)
        points = (min(columns), min(rows)), (max(columns), max(rows))
    return points
