"""Draw the regions that an answer names."""

from collections.abc import Iterable

from PIL import Image, ImageDraw

from minicpm_data.conversation.regions import Region

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


def draw(image: Image.Image, regions: Iterable[Region]) -> Image.Image:
    """A copy of an image with the outlines of regions, numbered from 1: fonts lack the letters of many labels."""
    drawn = image.convert("RGB")
    line = max(2, round(min(drawn.size) / 200))
    pen = ImageDraw.Draw(drawn)
    for number, region in enumerate(regions, 1):
        color, corners = COLORS[(number - 1) % len(COLORS)], region.outline(drawn.size)
        if region.kind == "point":
            (x, y), radius = corners[0], 2 * line
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=line)
        else:
            pen.line([*corners, corners[0]], fill=color, width=line, joint="curve")
        left, top = min(x for x, _ in corners), min(y for _, y in corners)
        corner = pen.textbbox((left + line, top + line), str(number))
        pen.rectangle((corner[0] - 2, corner[1] - 2, corner[2] + 2, corner[3] + 2), fill=color)
        pen.text((left + line, top + line), str(number), fill="white")
    return drawn
