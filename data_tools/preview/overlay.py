"""What is drawn over an image: boxes, and a class map as a translucent PNG, both in the colours of the legend."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from data_tools.shared.facts import Box, are_corners
from siglip_train.report.palette import colour
from siglip_train.report.thumbnail import data_url


class PlacedBox(NamedTuple):
    """A box in pixels, with a colour that stands for its label."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    label: str


def css(number: int) -> str:
    """`colour` as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*colour(number))


def placed(boxes: Sequence[Box], width: int, height: int) -> list[PlacedBox]:
    """The boxes over an image of that size; those outside it are left out."""
    labels = sorted({box.label for box in boxes})
    found = []
    for box in boxes:
        if are_corners(box.corners):
            x0, y0, x1, y1 = (
                value * side for value, side in zip(box.corners, (width, height) * 2, strict=True)
            )
            found.append(PlacedBox(x0, y0, x1 - x0, y1 - y0, css(labels.index(box.label)), box.label))
    return found


def mask_url(mask: Image.Image, size: tuple[int, int]) -> str:
    """The class map as a data URL of a PNG of that size; class 0 is clear."""
    classes = mask.resize(size, Image.Resampling.NEAREST)
    # the numbers of a palette image are kept, its colours are not
    coloured = Image.frombytes("P", classes.size, classes.tobytes())
    coloured.putpalette([value for number in range(256) for value in colour(number)])
    coloured.info["transparency"] = bytes([0, *[255] * 255])
    return data_url(coloured, "PNG")
