"""Colours that stand for classes, in pages of runs and of the data tools alike."""

import colorsys
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# steps of the golden ratio round the colour circle: neighbours in number are far apart in hue
_GOLDEN = 0.618034
# of what is ignored, and of class 0, which is most often the ground
_GREY, _PALE = (128, 128, 128), (240, 240, 240)


def colour(number: int) -> tuple[int, int, int]:
    """A strong colour for a class or label; the same number gives the same colour."""
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1.0, 0.75, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def coloured(classes: NDArray[np.uint8], ignored: Collection[int]) -> Image.Image:
    """A class map `[H, W]` in colours, class 0 pale, ignored classes in grey."""
    colours = [_PALE, *map(colour, range(1, 256))]
    for number in ignored:
        colours[number] = _GREY
    return Image.fromarray(np.array(colours, dtype=np.uint8)[classes])
