"""What finds boxes, and which of those it finds are kept."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_train.data.shards.reader import RawSample


class Found(NamedTuple):
    """B boxes of an image, each with the text that fits it best.

    boxes: `[B, 4]` left, top, right, bottom as shares of width and height. scores: `[B]` in 0..1. texts: `[B]` places
    in the list of texts that was asked for.
    """

    boxes: NDArray[np.floating]
    scores: NDArray[np.floating]
    texts: NDArray[np.integer]


class Detector(Protocol):
    """An open-vocabulary detector."""

    def prepare(self, image: Image.Image, sample: RawSample) -> Any:
        """What `find` needs of an image, an RGB one; called by several threads. Raises `SampleError`."""
        ...

    def find(self, prepared: Sequence[Any], texts: Sequence[Sequence[Sequence[str]]]) -> list[list[Found]]:
        """The boxes of each image for each of its lists of texts, none of which is empty.

        Raises `UserError` where the machine has no memory for so many images at once.
        """
        ...


class Limits(NamedTuple):
    """Which boxes are kept: those of at least `min_score`, and of boxes that overlap by more than `overlap` the best.

    overlap: intersection over union.
    """

    min_score: float
    overlap: float


def kept(found: Found, limits: Limits) -> list[int]:
    """The places of the boxes that are kept, the best first; those without area inside of the image are not."""
    boxes = _inside(found.boxes)
    has_area = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    left = [
        int(place)
        for place in np.argsort(-found.scores, kind="stable")
        if has_area[place] and found.scores[place] >= limits.min_score
    ]
    chosen: list[int] = []
    while left:
        best, *rest = left
        chosen.append(best)
        shares = _overlaps(boxes[best], boxes[rest])
        left = [place for place, overlap in zip(rest, shares, strict=True) if overlap <= limits.overlap]
    return chosen


def regions_of(found: Found, texts: Sequence[str], limits: Limits) -> list[dict[str, Any]]:
    """The regions that are kept, as they stand in json: `{box, text, score}` with boxes inside of the image."""
    boxes = _inside(found.boxes)
    return [
        {
            "box": boxes[place].tolist(),
            "text": texts[int(found.texts[place])],
            "score": round(float(found.scores[place]), 4),
        }
        for place in kept(found, limits)
    ]


def _inside(boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cut to the image, in as many digits as are written."""
    return np.clip(boxes.astype(np.float64), 0, 1).round(5)


def _overlaps(box: NDArray, others: NDArray) -> NDArray:
    """`[n]` intersection over union of a box and each of `[n, 4]`."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
    return shared / (np.prod(box[2:] - box[:2]) + areas - shared)
