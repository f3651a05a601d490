"""A detector without a model: it answers from the boxes that samples have already, by the words of their labels."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_tools.regions.detector import Found
from data_tools.regions.queries import words_of
from siglip_train.data.inputs.regions import Region, read_regions
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import RawSample


class KnownBoxes:
    """Boxes of a json field (`json:objects`) of `{box, label | text}`.

    The score of a text is the share of words that it has in common with the label: 1 where they are the same words.
    """

    def __init__(self, where: Field) -> None:
        self.where = where

    def prepare(self, image: Image.Image, sample: RawSample) -> list[Region]:  # noqa: ARG002
        """The boxes of a sample. Raises `SampleError` for those that are none."""
        return read_regions(self.where, sample)

    def find(
        self, prepared: Sequence[list[Region]], texts: Sequence[Sequence[Sequence[str]]]
    ) -> list[list[Found]]:
        """Each known box with the text that has most of its label's words."""
        return [
            [_fitted(regions, each) for each in groups]
            for regions, groups in zip(prepared, texts, strict=True)
        ]


def _fitted(regions: Sequence[Region], texts: Sequence[str]) -> Found:
    scores = np.array(
        [[_in_common(region.text, text) for text in texts] for region in regions], dtype=np.float64
    ).reshape(len(regions), len(texts))
    boxes = np.array([region.box for region in regions], dtype=np.float64).reshape(-1, 4)
    return Found(boxes, scores.max(axis=1), scores.argmax(axis=1))


def _in_common(label: str, text: str) -> float:
    ours, theirs = (frozenset(map(_singular, words_of(each))) for each in (label, text))
    return len(ours & theirs) / max(1, len(ours | theirs))


def _singular(word: str) -> str:
    return word.lower().removesuffix("s")
