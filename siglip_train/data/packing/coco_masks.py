"""The class map of an image, drawn from the polygons and run lengths of COCO's instances."""

import io
import json
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_train.data.remote.limits import MAX_PIXELS
from siglip_train.errors import SampleError


class Drawing(NamedTuple):
    """The class map of the image `path`, of `width` x `height` pixels, drawn when it is packed.

    shapes: JSON of [class 1..255, is it a crowd, segmentation] of every object, which takes the least memory.
    """

    path: str
    width: int
    height: int
    shapes: bytes

    @property
    def size(self) -> int:
        """A checksum, which tells when the shapes have changed."""
        return zlib.crc32(self.shapes)

    def read(self) -> bytes:
        """The PNG: 0 = no object; crowds below, and a small object over a large one. Raises `SampleError`."""
        if self.width * self.height > MAX_PIXELS:
            raise SampleError("broken mask", f"{self.width} x {self.height} pixels, limit {MAX_PIXELS}")
        try:
            shapes = [
                (number, crowd, _inside(segmentation, self.width, self.height))
                for number, crowd, segmentation in json.loads(self.shapes)
            ]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise SampleError("broken mask", f"{type(error).__name__}: {error}") from error
        classes = np.zeros((self.height, self.width), np.uint8)
        for number, _, inside in sorted(shapes, key=lambda shape: (not shape[1], -shape[2].sum())):
            classes[inside] = number
        buffer = io.BytesIO()
        Image.fromarray(classes).save(buffer, "PNG")
        return buffer.getvalue()


def _inside(segmentation: Any, width: int, height: int) -> NDArray[np.bool_]:
    """`[height, width]`: the pixels of an object, given as polygons or as {size, counts}."""
    if isinstance(segmentation, dict):
        runs = run_lengths(segmentation["counts"])
        if segmentation["size"] != [height, width] or sum(runs) != width * height:
            raise ValueError(f"its runs are not those of {width} x {height} pixels")
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width, order="F")
    inside = np.zeros((height, width), bool)
    for polygon in segmentation:
        inside |= _filled(np.array(polygon, float).reshape(-1, 2), width, height)
    return inside


def run_lengths(counts: str | list[int]) -> list[int]:
    """Lengths of runs, outside and inside in turn, of a list or of the string that pycocotools makes of it.

    The string has 5 bits of a number in every character, the lowest first, and from the fourth number on
    differences from the last but one.
    """
    if isinstance(counts, list):
        return counts
    runs: list[int] = []
    number = bits = 0
    for code in counts.encode():
        number |= (code - 48 & 31) << bits
        bits += 5
        if not code - 48 & 32:
            if code - 48 & 16:
                number -= 1 << bits
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = bits = 0
    return runs


def _filled(corners: NDArray[np.float64], width: int, height: int) -> NDArray[np.bool_]:
    """`[height, width]`: the pixels whose centres are in a polygon; corners: `[n, 2]` x, y in pixels."""
    # Pillow's polygons have whole corners, and the pixels of their edges: too large by a pixel
    (x0, y0), (x1, y1) = corners.T, np.roll(corners, -1, axis=0).T
    first, last = np.clip(np.ceil(np.sort([y0, y1], axis=0) - 0.5), 0, height).astype(int)
    # one entry for every edge and every row whose centres it crosses
    edge = np.repeat(np.arange(len(corners)), last - first)
    row = np.concatenate([np.arange(*rows) for rows in zip(first, last, strict=True)]).astype(int)
    x = x0[edge] + (row + 0.5 - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    crossed = np.zeros((height, width + 1), np.uint8)
    np.bitwise_xor.at(crossed, (row, np.clip(np.ceil(x - 0.5), 0, width).astype(int)), 1)
    return np.bitwise_xor.accumulate(crossed, axis=1)[:, :width] == 1
